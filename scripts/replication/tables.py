"""Make the tables of docs/results.md and docs/experiments.md as Markdown."""

import statistics
from collections.abc import Iterable, Sequence

from torchtitan.experiments.tst import paper
from torchtitan.experiments.tst.planning.numbers import count

from .analysis import Results, baseline_of
from .records import Recipe, Record


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "| " + " | ".join("---" for _ in rows[0]) + " |")
    return "\n".join(lines)


def comparison(
    results: Results,
    recipes: Iterable[Recipe],
    seeds: Sequence[int],
    against: dict[str, Recipe] | None = None,
) -> str:
    """Return a table of recipes with their losses, and how far they end below their baseline.

    Args:
        results: all runs.
        recipes: a row each; recipes without runs are skipped.
        seeds: seeds of the runs to show.
        against: further recipes to compare with, by their name in the column's head.
    """
    others = against or {}
    head = ["run", "n", "data tokens", "mean loss", "standard deviation", "below the baseline by"]
    rows = [[*head, *(f"below {name} by" for name in others)]]
    for recipe in recipes:
        runs = results.runs(recipe, seeds)
        if not runs:
            continue
        losses = [run.loss for run in runs]
        compared = [baseline_of(recipe), *(o.with_(corpus=recipe.corpus) for o in others.values())]
        rows.append(
            [
                recipe.schedule,
                f"{len(runs)}",
                count(runs[0].data_tokens),
                f"{mean(runs):.3f}",
                f"{statistics.stdev(losses):.3f}" if len(losses) > 1 else "",
                *(
                    "" if other == recipe else f"{results.lead(recipe, other, seeds)}"
                    for other in compared
                ),
            ]
        )
    return markdown(rows)


def by_share(results: Results, base: Recipe, seed: int) -> str:
    """Return a table of the loss of each schedule of one seed: a row for bag sizes, a column for r.

    Args:
        results: all runs.
        base: the baseline; the schedules differ from it only in bag sizes and steps.
        seed: seed of the runs.
    """
    runs = schedules(results, base, seed)
    ratios = sorted({run.step_ratio for run in runs})
    rows = [["*s* \\ *r*", *(f"{ratio:g}" for ratio in ratios)]]
    for sizes in sorted({run.bag_sizes for run in runs}, key=lambda sizes: (len(sizes), sizes)):
        of = {run.step_ratio: run for run in runs if run.bag_sizes == sizes}
        cells = (
            f"{of[r].loss:.3f} ({count(of[r].data_tokens)})" if r in of else "" for r in ratios
        )
        rows.append([", ".join(map(str, sizes)), *cells])
    return markdown(rows)


def schedules(results: Results, base: Recipe, seed: int) -> list[Record]:
    """Return the runs of one seed that differ from a baseline only in stages of equal length."""
    recipes = results.recipes(corpus=base.corpus, model=base.model, lr=base.lr, steps=base.steps)
    alike = [r for r in recipes if r.stages and r.equal_stages and r.with_(stages="") == base]
    return [run for recipe in alike for run in results.runs(recipe, [seed])]


def learning_rates(results: Results, recipe: Recipe, seeds: Sequence[int]) -> str:
    """Return a table of the mean loss of a recipe and its baseline over the peak learning rate."""
    rows = [["peak learning rate", "baseline", recipe.schedule, "lead"]]
    for rate in sorted({r.lr for r in results.recipes(model=recipe.model, corpus=recipe.corpus)}):
        at_rate = recipe.with_(lr=rate)
        pair = [results.runs(of, seeds) for of in (baseline_of(at_rate), at_rate)]
        if all(pair):
            lead = results.lead(at_rate, baseline_of(at_rate), seeds)
            rows.append([f"{rate:g}", *(f"{mean(runs):.3f}" for runs in pair), f"{lead}"])
    return markdown(rows)


def mean(runs: Iterable[Record]) -> float:
    """Return the mean loss of runs."""
    return statistics.mean(run.loss for run in runs)


def lengths(results: Results, recipes: Sequence[Recipe], seeds: Sequence[int]) -> str:
    """Return a table of the mean loss of recipes, their leads and their baseline over the steps.

    Args:
        results: all runs.
        recipes: a column each, of one model and corpus; their step ratios are kept.
        seeds: seeds of the runs to show.
    """
    rows = [["steps", "latents a parameter", "baseline", *(f"{r.schedule}: lead" for r in recipes)]]
    base = baseline_of(recipes[0])
    like = {"corpus": base.corpus, "model": base.model, "lr": base.lr}
    found = {(recipe.schedule, recipe.steps): recipe for recipe in results.recipes(**like)}
    for steps in sorted({steps for _, steps in found}):
        baselines = results.runs(base.with_(steps=steps), seeds)
        of_length = [found.get((recipe.schedule, steps)) for recipe in recipes]
        if baselines and any(of_length):
            cells = [
                f"{mean(results.runs(recipe, seeds)):.3f}: "
                f"{results.lead(recipe, baseline_of(recipe), seeds)}"
                if recipe and results.runs(recipe, seeds)
                else ""
                for recipe in of_length
            ]
            per_parameter = baselines[0].latents / baselines[0].parameters
            rows.append([f"{steps:,}", f"{per_parameter:.0f}", f"{mean(baselines):.3f}", *cells])
    return markdown(rows)


def surface(results: Results, base: Recipe, seed: int) -> paper.Surface:
    """Return the loss of the paper's recipes of one seed over r and s.

    Args:
        results: all runs.
        base: a baseline; the others differ from it only in bag size and superposition steps.
        seed: seed of the runs.
    """
    (baseline,) = results.runs(base, [seed])
    losses = {
        (run.step_ratio, run.bag_sizes[0]): run.loss
        for run in schedules(results, base, seed)
        if len(run.bag_sizes) == 1
    }
    return paper.Surface(
        base.model, baseline.parameters, base.steps, "uniform", baseline.loss, losses
    )
