"""Compare runs as the paper does: at equal FLOPs, at equal loss, at equal data.

    python scripts/compare_runs.py outputs/demo/tst
    python scripts/compare_runs.py outputs/mine UPSTREAM_RUN/tb --output outputs/comparison

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

from command_line import aligned, documented_parser
from comparison_tables import NOTES, VIEWS, rows_of_runs, rows_of_view
from plot_runs import draw
from report import write_report
from torchtitan.experiments.tst.job_config import SuperpositionConfigManager
from torchtitan.experiments.tst.results.comparison import (
    TRAINING,
    VALIDATION,
    Comparison,
    compare,
    flops,
)
from torchtitan.experiments.tst.results.curves import Curves, Place, read_curves


def read_runs(folders: Sequence[Path]) -> list[Curves]:
    """Each with the shortest name that tells it from the others.

    Raises:
        ValueError: for a folder without metrics, or given twice.
    """
    absolute = [folder.resolve() for folder in folders]
    if len(set(absolute)) < len(absolute):
        raise ValueError("a run is given twice")
    common = os.path.commonpath([folder.parent for folder in absolute])
    names = [os.path.relpath(folder, common) for folder in absolute]
    return [read_curves(folder, name) for folder, name in zip(folders, names, strict=True)]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers, unrounded, with the speed-ups and gains."""
    axes: dict[str, Callable[[Place], float]] = {
        "flops": flops,
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
    parser = documented_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    parser.add_argument(
        "--loss", choices=[VALIDATION, TRAINING], help="default: validation, if all runs have it"
    )
    parser.add_argument("--output", type=Path, help="folder; default, of a single run: its own")
    parser.add_argument(
        "--of-job",
        nargs=argparse.REMAINDER,
        help="last: arguments of a job in the place of its run folder: --job.config_file JOB ...",
    )
    args = parser.parse_args()
    try:
        if args.of_job:
            job = SuperpositionConfigManager().parse_args(args.of_job).job
            args.runs.append(Path(job.dump_folder))
        if not args.runs:
            parser.error("give a run folder")
        if len(args.runs) > 1 and not args.output:
            parser.error("--output: give a folder for the report of several runs")
        runs = read_runs(args.runs)
        if args.loss == VALIDATION and (without := [r.name for r in runs if not r.validation]):
            raise ValueError(f"--loss validation: {', '.join(without)} has none")
        comparison = compare(runs, args.loss)
        output = args.output or args.runs[0]
        output.mkdir(parents=True, exist_ok=True)
        (output / "comparison.json").write_text(json.dumps(as_json(comparison), indent=2) + "\n")
        draw(runs, comparison, output / "loss.png")
        write_report(runs, comparison, output / "loss.png", output / "report.html")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(aligned(rows_of_runs(comparison))))
    if comparison.pairs:
        for view in VIEWS:
            print(f"\nAt {view}:", *aligned(rows_of_view(comparison, view)), sep="\n")
    print(f"\n{NOTES[comparison.kind]}")
    print(f"report: {output / 'report.html'}\nloss curve: {output / 'loss.png'}")


if __name__ == "__main__":
    main()
