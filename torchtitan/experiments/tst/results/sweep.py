"""Collect the results of a sweep as a table and a plot, and run what is not finished."""

import csv
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..metrics_file import TRAINING_LOSS, VALIDATION_LOSS, read_metrics
from ..planning.sweep import read_sweep, value_in_words
from . import sweep_plots
from .tables import aligned


class SweepError(UserError, RuntimeError):
    """A run of a sweep that failed."""

    exit_code = 1


@dataclass
class Result:
    """The result of a run so far.

    Attributes:
        name: name of the run.
        folder: folder of the run.
        values: value of each varied key; None for keys without meaning in a baseline.
        step: the last logged step so far; 0 if there is none.
        steps: steps of the whole run.
        finished: whether its last logged step and its last validation are there.
        training_loss: training loss at ``step``.
        validation_loss: the last validation loss.
    """

    name: str
    folder: Path
    values: dict[str, Any]
    step: int
    steps: int
    finished: bool
    training_loss: float | None
    validation_loss: float | None


def results(folder: Path) -> list[Result]:
    """Return the results of all runs of a sweep so far, in the sweep's order."""
    found = []
    for run in read_sweep(folder)["runs"]:
        try:
            metrics = read_metrics(run["folder"])
        except FileNotFoundError:
            metrics = []
        last: dict[str, Any] = {}
        validated = 0
        for line in metrics:
            last |= {k: line[k] for k in ("step", TRAINING_LOSS, VALIDATION_LOSS) if k in line}
            if VALIDATION_LOSS in line:
                validated = line["step"]
        step = last.get("step", 0)
        found.append(
            Result(
                run["name"],
                Path(run["folder"]),
                run["values"],
                step,
                run["steps"],
                step >= run["last_logged"] and validated >= run.get("last_validated", 0),
                last.get(TRAINING_LOSS),
                last.get(VALIDATION_LOSS),
            )
        )
    return found


def write_table(folder: Path) -> Iterator[str]:
    """Write table.csv, and losses.png of the finished runs. Yield the table as lines of text."""
    found = results(folder)
    keys = list(read_sweep(folder)["vary"])
    head = ["run", *keys, "step", "steps", "training_loss", "validation_loss"]
    rows = [
        [n, *values_of(r), r.step, r.steps, r.training_loss, r.validation_loss]
        for n, r in enumerate(found)
    ]
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    finished = [result for result in found if result.finished]
    yield from aligned([head, *([_cell(value) for value in row] for row in rows)])
    yield f"{len(finished)} of {len(found)} runs finished; table: {folder / 'table.csv'}"
    if any(result.values[key] is not None for result in finished for key in keys):
        _plot(folder, finished)
        yield f"plot: {folder / 'losses.png'}"


def values_of(result: Result) -> list[Any]:
    """Return the values of the varied keys as cells of a table; None for keys without meaning."""
    values = result.values.values()
    return [value_in_words(v) if isinstance(v, list) else v for v in values]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    is_loss = isinstance(value, float) and value > 0.1
    return f"{value:.4f}" if is_loss else value_in_words(value)


def _plot(folder: Path, finished: list[Result]) -> None:
    validated = all(result.validation_loss is not None for result in finished)
    losses = [(r, r.validation_loss if validated else r.training_loss) for r in finished]
    points = [sweep_plots.Point(r.values, loss) for r, loss in losses if loss is not None]
    kind = "validation" if validated else "training"
    sweep_plots.draw(folder, points, folder / "losses.png", f"{kind} loss")


def run_unfinished(
    folder: Path,
    jobs: int,
    processes: int | None,
    say: Callable[[str], None],
    skip: Container[str] = (),
) -> None:
    """Run the unfinished runs of a sweep on this machine.

    Args:
        folder: folder of the sweep.
        jobs: runs at a time; with more than one, their output goes to FOLDER/N.log.
        processes: number of processes of each run, as ``--nproc`` of ``tst train``.
        say: called with each line of progress.
        skip: names of runs that count as finished.

    Raises:
        SweepError: for the first run that fails, after the others that are running have ended.
    """
    found = results(folder)
    waiting = [
        (n, result)
        for n, result in enumerate(found)
        if not result.finished and result.name not in skip
    ]
    say(f"{len(found) - len(waiting)} of {len(found)} runs are finished")
    train = [sys.executable, "-m", __package__.rpartition(".")[0], "train"]
    options = [] if processes is None else [f"--nproc={processes}"]
    failed = threading.Event()

    def run_one(number: int, name: str) -> None:
        if failed.is_set():
            return
        head, began = f"[{number + 1}/{len(found)}] {name}", time.monotonic()
        say(head)
        log = folder / f"{number}.log"
        with log.open("w") if jobs > 1 else nullcontext() as output:
            command = [*train, str(folder / f"{number}.toml"), *options]
            code = subprocess.run(command, stdout=output, stderr=output).returncode
        if code:
            failed.set()
            seen = f"; see {log}" if jobs > 1 else ""
            raise SweepError(f"{name} ended with exit code {code}{seen}")
        say(f"{head}: {timedelta(seconds=round(time.monotonic() - began))}")

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run_one, number, result.name) for number, result in waiting]:
            future.result()
