"""The plots of docs/results.md."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from replication_results import Results


def draw_losses(results: Results, losses: dict[str, dict[int, float]], output: Path) -> None:
    """Mean validation loss over steps of each s, and its lead over the baseline's, with all seeds.

    Args:
        results: the runs.
        losses: of each run by step.
        output: the PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    variants = {
        name: [losses[record.run] for record in records]
        for name, records in results.variants().items()
        if all(record.mode == "full" and not record.reinit for record in records)
    }
    baselines = variants["baseline"]
    for index, (name, runs) in enumerate(variants.items()):
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        means = [statistics.mean(run[step] for run in runs) for step in steps]
        left.plot(steps, means, "o-", color=f"C{index}", markersize=3, label=name)
        if name != "baseline":
            for run, baseline in zip(runs, baselines, strict=True):
                leads = [baseline[step] - run[step] for step in steps]
                right.plot(steps, leads, color=f"C{index}", alpha=0.5, linewidth=1)
    boundary = round(0.3 * results.base.steps)
    for panel in (left, right):
        panel.axvline(boundary, color="black", linestyle="--", linewidth=1)
        panel.set(xlabel="step", xlim=(0, results.base.steps))
        panel.grid(alpha=0.3)
    right.axhline(0, color="C0")
    left.set(ylabel="validation loss (nats per token)", title="Mean of the seeds", ylim=(3.5, 5.8))
    right.set(ylabel="below the baseline by (nats)", title="Each seed", ylim=(-0.25, 0.1))
    left.legend(fontsize="small")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def draw_variants(results: Results, output: Path) -> None:
    """Final loss of each variant and seed, and the lead of s = 4 over the number of steps."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4.5), layout="constrained", width_ratios=(2, 1)
    )
    variants = results.variants()
    for row, (name, records) in enumerate(variants.items()):
        losses = [record.loss for record in records]
        left.plot(losses, [row] * len(losses), "o", color=f"C{row}", alpha=0.6)
        left.plot([statistics.mean(losses)], [row], "|", color="black", markersize=18)
        if name == "baseline":
            left.axvline(statistics.mean(losses), color=f"C{row}", linestyle="--", linewidth=1)
    left.set_yticks(range(len(variants)), list(variants))
    left.invert_yaxis()
    left.set(xlabel="final validation loss (nats per token)", title="Each seed, and the mean")
    pairs = results.lengths()
    right.plot(
        [tst.latents / tst.parameters for _, tst in pairs],
        [baseline.loss - tst.loss for baseline, tst in pairs],
        "o-",
    )
    right.axhline(0, color="black", linewidth=1)
    right.set_xscale("log")
    ticks = [round(tst.latents / tst.parameters) for _, tst in pairs]
    right.set_xticks(ticks, [f"{tick}" for tick in ticks])
    right.minorticks_off()
    right.set(
        xlabel="latents a parameter", ylabel="below the baseline by (nats)", title="TST, s = 4"
    )
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.savefig(output, dpi=120)
    plt.close(figure)
