"""Compare runs as the paper does: at equal FLOPs, equal loss and equal data.

    tst compare outputs/demo/tst
    tst compare outputs/mine UPSTREAM_RUN --output outputs/comparison

Prints tables. Writes report.html, which has everything in one file, comparison.json and the plots:
loss.png, scores.png if checkpoints have scores (`tst evaluate RUN --all`), and experts.png for
mixtures of experts. Name a run by its folder. A run of TorchTitan's own trainer needs TensorBoard
files.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..config.manager import SuperpositionConfigManager
from ..errors import ArgumentError
from ..results.comparison import compare
from ..results.curves import read_runs
from ..results.score_comparison import PairOfScores, compare_scores
from ..results.tables import (
    EQUAL_FLOPS,
    NOTES,
    VIEWS,
    aligned,
    rows_of_experts,
    rows_of_runs,
    rows_of_scores,
    rows_of_view,
)
from .arguments import job_arguments


def main(
    overrides: list[str],
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN", help="Run folders.")],
    /,
    loss: Literal["validation", "training"] | None = None,
    output: Path | None = None,
    job: Annotated[Path | None, arg(metavar="JOB.toml")] = None,
) -> None:
    """Compare runs.

    Args:
        overrides: Arguments of `job`.
        runs: Folders of the runs.
        loss: Loss to compare. By default validation, if all runs have it.
        output: Folder for the files. A single run has its own folder as default.
        job: Compare the run of this job, too. Further arguments override its TOML.
    """
    from ..results.report import write_comparison

    folders = list(runs)
    if job:
        config = SuperpositionConfigManager().parse_args(job_arguments(job, overrides))
        folders.append(Path(config.job.dump_folder))
    elif overrides:
        raise ArgumentError(f"{' '.join(overrides)}: arguments of a job need --job JOB.toml")
    if not folders:
        raise ArgumentError("give at least one run folder")
    if len(folders) > 1 and not output:
        raise ArgumentError("several runs need --output, a folder for the report")
    curves = read_runs(folders)
    comparison = compare(curves, loss)
    command = shlex.join(["tst", *sys.argv[1:]])
    report, *plots = write_comparison(curves, comparison, output or folders[0], command)
    print("\n".join(aligned(rows_of_runs(comparison))))
    if of_experts := rows_of_experts(curves):
        print("\nShares of experts, in % of a router's choices:", *aligned(of_experts), sep="\n")
    if comparison.pairs:
        for view in VIEWS:
            print(f"\nAt {view}:", *aligned(rows_of_view(comparison, view)), sep="\n")
            if view == EQUAL_FLOPS:
                _print_scores(compare_scores(curves))
    print(f"\n{NOTES[comparison.kind]}\nreport: {report}\nplots: {', '.join(map(str, plots))}")


def _print_scores(pairs: list[PairOfScores]) -> None:
    rows, skipped = rows_of_scores(pairs), [reason for pair in pairs for reason in pair.skipped]
    if rows or skipped:
        print(f"\nScores at {EQUAL_FLOPS}:", *(aligned(rows) if rows else []), *skipped, sep="\n")
