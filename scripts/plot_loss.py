"""Draw the loss curves of one run, or of several on top of each other, as a PNG.

    python scripts/plot_loss.py outputs/demo/tst
    python scripts/plot_loss.py outputs/demo/tst outputs/demo/baseline --output both.png

--of-job, last, takes the arguments of a job in the place of its run folder.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from torchtitan.experiments.tst.metrics import TRAINING_LOSS, VALIDATION_LOSS, read_metrics


def draw_run(axes: Axes, metrics: list[dict[str, Any]], name: str, color: str) -> None:
    """Validation loss in full colour, training loss pale, dotted where it is over bags."""
    phases = dict.fromkeys(line["phase"] for line in metrics)
    for phase in phases:
        style = ":" if phase == "superposition" else "-"
        points = [
            (m["step"], m[TRAINING_LOSS])
            for m in metrics
            if TRAINING_LOSS in m and m["phase"] == phase
        ]
        axes.plot(
            *zip(*points, strict=True),
            style,
            color=color,
            alpha=0.4,
            linewidth=1,
            label=f"{name}: training, {phase}" if len(phases) > 1 else f"{name}: training",
        )
    if points := [(m["step"], m[VALIDATION_LOSS]) for m in metrics if VALIDATION_LOSS in m]:
        final = f"{points[-1][1]:.3f} at step {points[-1][0]}"
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=color,
            markersize=3,
            label=f"{name}: validation, next token ({final})",
        )
    if len(phases) > 1:
        boundary = max(m["step"] for m in metrics if m["phase"] == "superposition")
        axes.axvline(boundary, color=color, linestyle="--", linewidth=1)
        axes.text(
            boundary, 0.98, " boundary", color=color, va="top", transform=axes.get_xaxis_transform()
        )


def draw(runs: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """One figure of all runs by name; the first steps' high losses are cut off."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for index, (name, metrics) in enumerate(runs.items()):
        draw_run(axes, metrics, name, f"C{index}")
    last_step = max(m["step"] for metrics in runs.values() for m in metrics)
    losses = [
        m[key]
        for metrics in runs.values()
        for m in metrics
        for key in (TRAINING_LOSS, VALIDATION_LOSS)
        if key in m and m["step"] > 0.05 * last_step
    ]
    axes.set(xlabel="step", ylabel="loss (nats per target token)", xlim=(0, last_step))
    axes.set_ylim(min(losses) - 0.1, max(losses) + 0.1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, help="by default loss.png in the first run folder")
    parser.add_argument("--of-job", nargs=argparse.REMAINDER, help="--job.config_file JOB ...")
    args = parser.parse_args()
    if args.of_job:
        from torchtitan.experiments.tst.job_config import SuperpositionConfigManager

        args.runs.append(Path(SuperpositionConfigManager().parse_args(args.of_job).job.dump_folder))
    if not args.runs:
        parser.error("give a run folder")
    output = args.output or args.runs[0] / "loss.png"
    draw({os.fspath(run): read_metrics(run) for run in args.runs}, output)
    print(f"loss curve: {output}")


if __name__ == "__main__":
    main()
