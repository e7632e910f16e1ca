"""Compare runs as the paper does: at equal FLOPs, at equal loss, at equal data.

    tst compare outputs/demo/tst
    tst compare outputs/mine UPSTREAM_RUN/tb --output outputs/comparison

Prints tables, and writes comparison.json, loss.png, of a mixture of experts experts.png, and one
file with everything, report.html. A run is its folder; of TorchTitan's own trainer TensorBoard's
files will do.
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
from ..results.tables import NOTES, VIEWS, aligned, rows_of_experts, rows_of_runs, rows_of_view
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
        overrides: arguments of `job`.
        runs: their folders.
        loss: What to compare. By default validation, if all runs have it.
        output: Folder for the files. By default, of a single run, its own.
        job: Take the run of this job too. Further arguments are the job's, over the TOML.
    """
    from ..results.report import write_comparison

    folders = list(runs)
    if job:
        config = SuperpositionConfigManager().parse_args(job_arguments(job, overrides))
        folders.append(Path(config.job.dump_folder))
    elif overrides:
        raise ArgumentError(f"{' '.join(overrides)}: needs --job JOB.toml")
    if not folders:
        raise ArgumentError("give a run folder")
    if len(folders) > 1 and not output:
        raise ArgumentError("--output: give a folder for the report of several runs")
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
    print(f"\n{NOTES[comparison.kind]}\nreport: {report}\nplots: {', '.join(map(str, plots))}")
