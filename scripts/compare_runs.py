"""Compare runs as the paper does: at equal FLOPs, at equal loss, at equal data.

    python scripts/compare_runs.py outputs/demo/tst outputs/demo/baseline --output outputs/demo
    python scripts/compare_runs.py outputs/mine UPSTREAM_RUN/tb

Prints tables, and writes comparison.json, loss.png and report.html, one file with everything. A
run is its folder; of TorchTitan's own trainer TensorBoard's files will do.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tables import aligned
from torchtitan.experiments.tst.planning.plan import count
from torchtitan.experiments.tst.results.comparison import (
    TRAINING,
    VALIDATION,
    Comparison,
    EqualCost,
    Pair,
    compare,
)
from torchtitan.experiments.tst.results.curves import Curves, Place, read_curves


def read_runs(folders: Sequence[Path]) -> list[Curves]:
    """Each with the shortest name that tells it from the others.

    Raises:
        ValueError: for a folder without metrics, or given twice.
    """
    absolute = [folder.absolute() for folder in folders]
    if len(set(absolute)) < len(absolute):
        raise ValueError("a run is given twice")
    common = os.path.commonpath([folder.parent for folder in absolute])
    names = [os.path.relpath(folder, common) for folder in absolute]
    return [read_curves(folder, name) for folder, name in zip(folders, names, strict=True)]


def rows_of_runs(comparison: Comparison) -> list[list[str]]:
    """What each run came to; the first row is the head."""
    head = ["run", "s", "steps", "of these in superposition", "data tokens", "latents", "FLOPs"]
    head += ["hours", f"final {comparison.kind} loss", "spike at the boundary", "recovered after"]
    rows = [head]
    for run in comparison.runs:
        recovered = "-"
        if run.spike is not None:
            recovered = "never"
        if run.recovery_steps is not None:
            recovered = f"{run.recovery_steps:,.0f} steps"
        rows.append(
            [
                run.name,
                f"{run.bag_size}",
                f"{run.end.step:,.0f}",
                f"{run.boundary:,}" if run.boundary else "-",
                count(run.end.data_tokens),
                count(run.end.latents),
                f"{run.end.flops:.3e}",
                f"{run.end.hours:.3g}",
                _loss(run.final_loss),
                "-" if run.spike is None else f"{run.spike:+.3f}",
                recovered,
            ]
        )
    return rows


def rows_of_view(comparison: Comparison, view: str) -> list[list[str]]:
    """A row for each pair, for one of :data:`VIEWS`; the first row is the head."""
    if view == "equal loss":
        head = ["", "loss", "FLOPs", "baseline's", "speed-up, FLOPs", "speed-up, hours"]
        return [head, *(_equal_loss_row(pair) for pair in comparison.pairs)]
    unit = "FLOPs" if view == "equal FLOPs" else "data tokens"
    head = ["", unit, "loss", "baseline's", "lower by"]
    if view == "equal FLOPs":
        head.append("below it from step")
    head.append("both end there")
    return [head, *(_equal_cost_row(pair, view) for pair in comparison.pairs)]


def _equal_loss_row(pair: Pair) -> list[str]:
    equal = pair.equal_loss
    if equal is None:
        return [_title(pair), *["-"] * 5]
    return [
        _title(pair),
        _loss(equal.loss),
        f"{equal.at.flops:.3e}",
        f"{equal.baseline_at.flops:.3e}",
        f"{equal.speed_up(lambda at: at.flops):.2f}",
        f"{equal.speed_up(lambda at: at.hours):.2f}",
    ]


def _equal_cost_row(pair: Pair, view: str) -> list[str]:
    equal: EqualCost = pair.equal_flops if view == "equal FLOPs" else pair.equal_data
    row = [
        _title(pair),
        f"{equal.at:.3e}" if view == "equal FLOPs" else count(equal.at),
        _loss(equal.loss),
        _loss(equal.baseline_loss),
        "-" if equal.gain is None else f"{equal.gain:+.3f}",
    ]
    if view == "equal FLOPs":
        row.append(f"{pair.below_from.step:,.0f}" if pair.below_from else "-")
    return [*row, "yes" if equal.ended else "no"]


def _title(pair: Pair) -> str:
    return f"{pair.run} against {pair.baseline}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


VIEWS = {
    "equal FLOPs": "Both have spent the same: the paper's first claim is a lower loss then.",
    "equal loss": "What both spent until they first had the higher of the two final losses.",
    "equal data": "Both have read the same data tokens: here the paper, too, finds the baseline "
    "ahead.",
}
NOTES = {
    VALIDATION: "Losses are next-token losses on held-out data, in both phases.",
    TRAINING: "Not every run has validation: losses are next-token training losses, trailing means "
    "over 2 % of the logged steps.",
}


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers, unrounded, with the speed-ups and gains."""
    axes: dict[str, Callable[[Place], float]] = {
        "flops": lambda at: at.flops,
        "hours": lambda at: at.hours,
        "steps": lambda at: at.step,
    }
    content = dataclasses.asdict(comparison)
    for entry, pair in zip(content["pairs"], comparison.pairs, strict=True):
        entry["equal_flops"]["gain"] = pair.equal_flops.gain
        entry["equal_data"]["gain"] = pair.equal_data.gain
        if pair.equal_loss:
            speed_up = {name: pair.equal_loss.speed_up(axis) for name, axis in axes.items()}
            entry["equal_loss"]["speed_up"] = speed_up
    return content


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    parser.add_argument(
        "--loss", choices=[VALIDATION, TRAINING], help="default: validation, if all runs have it"
    )
    parser.add_argument("--output", type=Path, help="folder; default: that of the first run")
    parser.add_argument(
        "--of-job",
        nargs=argparse.REMAINDER,
        help="last: arguments of a job in the place of its run folder: --job.config_file JOB ...",
    )
    args = parser.parse_args()
    if args.of_job:
        from torchtitan.experiments.tst.job_config import SuperpositionConfigManager

        args.runs.append(Path(SuperpositionConfigManager().parse_args(args.of_job).job.dump_folder))
    if not args.runs:
        parser.error("give a run folder")
    try:
        runs = read_runs(args.runs)
        if args.loss == VALIDATION and (without := [r.name for r in runs if not r.validation]):
            raise ValueError(f"--loss validation: {', '.join(without)} has none")
        comparison = compare(runs, args.loss)
        output = args.output or args.runs[0]
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    from plot_runs import draw
    from report import write_report

    (output / "comparison.json").write_text(json.dumps(as_json(comparison), indent=2) + "\n")
    draw(runs, comparison, output / "loss.png")
    write_report(runs, comparison, output / "loss.png", output / "report.html")
    print("\n".join(aligned(rows_of_runs(comparison))))
    if comparison.pairs:
        for view in VIEWS:
            print(f"\nAt {view}:", *aligned(rows_of_view(comparison, view)), sep="\n")
    print(f"\n{NOTES[comparison.kind]}")
    print(f"report: {output / 'report.html'}\nloss curve: {output / 'loss.png'}")


if __name__ == "__main__":
    main()
