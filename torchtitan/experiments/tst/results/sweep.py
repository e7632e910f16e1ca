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

from .. import paper
from ..config.manager import SuperpositionConfigManager
from ..config.sections import superposition_section
from ..errors import UserError
from ..planning.plan import parameters_of
from ..planning.sweep import BAG_SIZE, BASELINE, STEP_RATIO, read_sweep, value_in_words
from ..training.metrics import TRAINING_LOSS, VALIDATION_LOSS, read_metrics
from .tables import aligned


class SweepError(UserError, RuntimeError):
    """A run of a sweep that failed."""

    exit_code = 1


@dataclass
class Result:
    """The result of a run so far.

    Attributes:
        name: name of the run.
        values: value of each varied key; None for keys without meaning in a baseline.
        step: the last logged step so far; 0 if there is none.
        steps: steps of the whole run.
        finished: whether its last logged step and its last validation are there.
        training_loss: training loss at ``step``.
        validation_loss: the last validation loss.
    """

    name: str
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

    def of_run(result: Result) -> list[Any]:
        values = (result.values[key] for key in keys)
        return [value_in_words(v) if isinstance(v, list) else v for v in values]

    rows = [
        [n, *of_run(r), r.step, r.steps, r.training_loss, r.validation_loss]
        for n, r in enumerate(found)
    ]
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    finished = [result for result in found if result.finished]
    yield from aligned([head, *([_cell(value) for value in row] for row in rows)])
    yield f"{len(finished)} of {len(found)} runs finished; table: {folder / 'table.csv'}"
    if any(result.values[key] is not None for result in finished for key in keys):
        _plot(folder, keys, finished)
        yield f"plot: {folder / 'losses.png'}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    is_loss = isinstance(value, float) and value > 0.1
    return f"{value:.4f}" if is_loss else value_in_words(value)


def _plot(folder: Path, keys: list[str], finished: list[Result]) -> None:
    """Plot the loss over s for each r next to the paper's, or over a sweep's first key."""
    from ..planning.surface_plots import draw_lines, draw_surfaces

    validated = all(result.validation_loss is not None for result in finished)
    kind = "validation" if validated else "training"
    losses: list[tuple[Result, Any]] = [
        (r, r.validation_loss if validated else r.training_loss) for r in finished
    ]
    staged = any(isinstance(value, list) for r in finished for value in r.values.values())
    if set(keys) == {BAG_SIZE, STEP_RATIO} and not staged:
        own = _surface(folder, losses)
        nearest = paper.nearest_surface(own.parameters, own.steps, own.weighting)
        draw_surfaces(
            {f"this sweep, {kind} loss: {own.title}": own, f"paper: {nearest.title}": nearest},
            folder / "losses.png",
        )
        return
    lines: dict[str, list[tuple[Any, float]]] = {}
    for result, loss in losses:
        x, *others = (result.values[key] for key in keys)
        label = ", ".join(
            BASELINE if value is None else f"{key} = {value_in_words(value)}"
            for key, value in zip(keys[1:], others, strict=True)
        )
        x = value_in_words(x) if isinstance(x, list) else BASELINE if x is None else x
        lines.setdefault(label, []).append((x, loss))
    draw_lines(lines, keys[0], f"final {kind} loss", folder / "losses.png")


def _surface(folder: Path, losses: list[tuple[Result, Any]]) -> paper.Surface:
    """Return the surface of a sweep over s and r with at least one run with superposition."""
    by_place = {(r.values[STEP_RATIO], r.values[BAG_SIZE]): loss for r, loss in losses}
    baseline = by_place.pop((None, None), None)
    runs = read_sweep(folder)["runs"]
    number = next(n for n, run in enumerate(runs) if run["values"][BAG_SIZE] is not None)
    job = f"--job.config_file={folder / f'{number}.toml'}"
    config = SuperpositionConfigManager().parse_args([job])
    return paper.Surface(
        model=config.model.flavor,
        parameters=parameters_of(config),
        steps=config.training.steps,
        weighting=superposition_section(config).weighting,
        baseline=baseline,
        losses=by_place,
    )


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
