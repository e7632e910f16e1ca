"""Vary values of a job: write the configs, run them, collect the results.

    tst sweep make outputs/sweep JOB.toml --vary superposition.bag_size=4,6 --vary debug.seed=0,1
    tst sweep run outputs/sweep
    tst sweep table outputs/sweep
    tst sweep table outputs/sweep --evaluate

"run" trains on this machine without Slurm: one run after the other, or several with --jobs.
"table --evaluate" scores the finished runs with the LM-Eval harness.
"""

import functools
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg, subcommand

from ..errors import ArgumentError
from ..planning.sweep import make, parse_vary, submission
from ..results.sweep import run_unfinished, write_table
from ..results.sweep_scores import TASKS, evaluate_sweep
from .arguments import Job, check_positive, job_arguments
from .harness_options import HarnessOptions

Folder = Annotated[Positional[Path], arg(metavar="FOLDER", help="Folder of the sweep.")]


@dataclass
class Make:
    """Write the configs. Further arguments override the job's TOML in all runs."""

    folder: Folder
    job: Job
    vary: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=V1,V2,...")]
    """
    Values of a key. Repeat the option for several keys.
    Each combination of values is a run.
    Put a list in brackets to make it one value:
    superposition.bag_size=4,[8,4,2].
    """


@dataclass
class Run:
    """Run on this machine what is not finished."""

    folder: Folder
    jobs: Annotated[int, arg(metavar="N")] = 1
    """Number of runs at a time. They share the GPUs."""
    nproc: Annotated[int | None, arg(metavar="N")] = None
    """Processes of each run. By default one for each GPU, or 2 on CPU."""


@dataclass
class Table:
    """Collect the results in table.csv and losses.png."""

    folder: Folder
    evaluate: bool = False
    """Also score the finished runs: scores.csv, and scores_TASK.png next to the paper's."""
    harness: HarnessOptions = field(default_factory=HarnessOptions)


def main(
    overrides: list[str],
    action: Annotated[Make, subcommand("make")]
    | Annotated[Run, subcommand("run")]
    | Annotated[Table, subcommand("table")],
) -> None:
    """Make or run a sweep, or collect its results.

    Args:
        overrides: Arguments of the job.
        action: What to do.
    """
    if overrides and not isinstance(action, Make):
        raise ArgumentError(
            f"{' '.join(overrides)}: only `tst sweep make` accepts arguments of a job"
        )
    if isinstance(action, Make):
        _, *arguments = job_arguments(action.job, overrides)
        points = make(action.folder, str(action.job), parse_vary(action.vary), arguments)
        for number, point in enumerate(points):
            print(f"{action.folder / str(number)}.toml: {point.name}")
        here = f"tst sweep run {shlex.quote(str(action.folder))}"
        print(submission(action.folder, len(points)) or here)
        return
    say = functools.partial(print, flush=True)
    if isinstance(action, Run):
        check_positive(jobs=action.jobs, nproc=action.nproc)
        run_unfinished(action.folder, action.jobs, action.nproc, say)
        return
    action.harness.check_only_with("--evaluate", action.evaluate)
    print("\n".join(write_table(action.folder)), flush=True)
    if action.evaluate:
        tasks, limit = action.harness.chosen(TASKS), action.harness.limit
        evaluate_sweep(action.folder, tasks, limit, lambda: action.harness.build(tasks), say)
