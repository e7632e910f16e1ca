"""Draw the plots of docs/results.md."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from .analysis import Results, baseline_of
from .records import Recipe


def draw_leads(
    results: Results, recipes: Sequence[Recipe], seeds: Sequence[int], output: Path
) -> None:
    """Draw how far each recipe ends below its baseline: each seed, mean and 95 % interval.

    Args:
        results: all runs.
        recipes: a row each, from the top; recipes without runs are skipped.
        seeds: seeds of the runs to show.
        output: the PNG file to write.
    """
    leads = {recipe: results.lead(recipe, baseline_of(recipe), seeds) for recipe in recipes}
    leads = {recipe: lead for recipe, lead in leads.items() if lead.n}
    if not leads:
        return
    corpora = list(dict.fromkeys(recipe.corpus for recipe in recipes))
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.4 * len(leads)), layout="constrained")
    for row, (recipe, lead) in enumerate(leads.items()):
        color = f"C{corpora.index(recipe.corpus)}"
        axes.plot([*lead.differences.values()], [row] * lead.n, "o", color=color, alpha=0.5)
        if lead.n > 1:
            low, high = lead.interval
            axes.errorbar(
                [lead.mean],
                [row],
                xerr=[[lead.mean - low], [high - lead.mean]],
                fmt="|",
                color=color,
                markersize=14,
                capsize=4,
            )
    axes.set_yticks(range(len(leads)), [f"{r.schedule} ({r.corpus})" for r in leads])
    axes.margins(y=0.2)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=1)
    axes.set(xlabel="final validation loss below the baseline by (nats per token)")
    axes.grid(alpha=0.3)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def draw_losses(
    results: Results,
    losses: dict[str, dict[int, float]],
    recipes: Sequence[Recipe],
    seeds: Sequence[int],
    output: Path,
) -> None:
    """Draw the mean validation loss of recipes over steps, and each seed's lead.

    Nothing is drawn until each recipe has a run of each seed.

    Args:
        results: all runs.
        losses: validation loss of each run by step.
        recipes: a line each, of one corpus and number of steps; the first is the baseline.
        seeds: seeds of the runs to show.
        output: the PNG file to write.
    """
    if any(len(results.runs(recipe, seeds)) < len(seeds) for recipe in recipes):
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    baselines = [losses[run.run] for run in results.runs(recipes[0], seeds)]
    in_recovery: list[float] = []  # leads in recovery
    for index, recipe in enumerate(recipes):
        runs = [losses[run.run] for run in results.runs(recipe, seeds)]
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        means = [statistics.mean(run[step] for run in runs) for step in steps]
        left.plot(steps, means, "o-", color=f"C{index}", markersize=3, label=recipe.schedule)
        if index:
            for run, baseline in zip(runs, baselines, strict=True):
                leads = {step: baseline[step] - run[step] for step in steps}
                right.plot([*leads], [*leads.values()], color=f"C{index}", alpha=0.5, linewidth=1)
                in_recovery += [leads[step] for step in steps if step > recipe.boundary]
    for panel in (left, right):
        panel.set(xlabel="step", xlim=(0, recipes[0].steps))
        panel.grid(alpha=0.3)
    right.axhline(0, color="C0")
    last = min(run[max(run)] for run in baselines)
    left.set(
        ylabel="validation loss (nats per token)",
        title="Mean of the seeds",
        ylim=(last - 0.2, last + 2),
    )
    right.set(ylabel="below the baseline by (nats per token)", title="Each seed")
    right.set_ylim(min(in_recovery) - 0.05, max(in_recovery) + 0.05)
    left.legend(fontsize="small")
    figure.savefig(output, dpi=120)
    plt.close(figure)
