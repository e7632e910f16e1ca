"""Score the runs of a sweep, and write their scores next to the paper's.

This module does not import the harness unless a run is to be scored.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .. import paper
from ..planning.sweep import read_sweep
from ..resilience.checkpoint import inventory, manifests
from ..resilience.checkpoint.manifests import CheckpointError
from . import sweep_plots
from .scores import METRICS, Score, read_evaluations
from .sweep import Result, results
from .sweep_plots import Point
from .sweep_score_tables import (
    ScoredRun,
    lines_of_runs,
    lines_of_surface,
    rows_of_runs,
    rows_of_surface,
)

if TYPE_CHECKING:
    from .harness import Harness  # needs the extra "eval"

TASKS = [task for task in METRICS if task in paper.SCORE_TASKS]  # in the order of Table 3


def evaluate_sweep(
    folder: Path,
    tasks: list[str],
    limit: int | None,
    make_harness: Callable[[], "Harness"],
    say: Callable[[str], None],
) -> None:
    """Score the finished runs of a sweep, and write their scores next to the paper's.

    The last checkpoint of each run is scored on the tasks that it is not scored on. A run whose
    last checkpoint is missing or damaged is skipped.

    Args:
        folder: folder of the sweep.
        tasks: names of tasks of the harness.
        limit: the limit of documents of the harness; scores with another limit do not count.
        make_harness: returns the harness; it is not called if no score is missing.
        say: called with each line of text.

    Raises:
        ArgumentError: for tasks that the harness does not know, or if another process scores a run.
        ExportError: for a model that cannot be exported.
    """
    finished = [result for result in results(folder) if result.finished]
    missing = [r for r in finished if not set(tasks) <= last_scores(r, limit).keys()]
    if missing:
        harness = make_harness()
        from .run_evaluation import evaluate_run
    for number, result in enumerate(missing, start=1):
        say(f"[{number}/{len(missing)}] {result.name}")
        try:
            evaluate_run(result.folder, [], harness, say, last_only=True)
        except CheckpointError as error:
            say(f"{result.name} is skipped: {error}")
    for line in write_scores(folder, tasks, limit):
        say(line)


def last_scores(result: Result, limit: int | None) -> dict[str, Score]:
    """Return the scores of a run's last step by task.

    Scores of an earlier checkpoint of this step, which was trained again since, do not count. A
    damaged checkpoint has none.

    Args:
        result: the run.
        limit: the limit of documents of the scores; None for those of whole tasks.
    """
    checkpoint = inventory.step_folder(inventory.checkpoints_of(result.folder), result.steps)
    try:
        identity = manifests.identity(checkpoint) if checkpoint.is_dir() else None
    except CheckpointError:
        return {}
    return {
        e.task: e.score
        for e in read_evaluations(result.folder, limit)
        if e.step == result.steps and identity in (None, e.checkpoint)
    }


def write_scores(folder: Path, tasks: list[str], limit: int | None) -> Iterator[str]:
    """Write tables and plots of the scores of the finished runs. Yield them as lines of text.

    ``scores.csv`` has a row for each run, with its average rank. Each task has a plot,
    ``scores_TASK.png``, and, in a sweep over s and r, a table, ``scores_TASK.csv``.

    Args:
        folder: folder of the sweep.
        tasks: names of tasks; a run that is not scored on all of them is skipped.
        limit: the limit of documents of the scores.
    """
    found = results(folder)
    runs = []
    for number, result in enumerate(found):
        scores = last_scores(result, limit) if result.finished else {}
        if set(tasks) <= scores.keys():
            runs.append(ScoredRun(number, result, {task: scores[task] for task in tasks}))
    keys = list(read_sweep(folder)["vary"])
    papers: dict[str, paper.Surface] = {}
    for task in tasks:
        points = [Point(r.result.values, r.scores[task].value, r.scores[task].error) for r in runs]
        if sweep_plots.is_surface(keys, points):
            own = sweep_plots.surface_of(folder, points, task)
            if nearest := sweep_plots.nearest_to(own):
                papers[task] = nearest
            yield from [*lines_of_surface(own, nearest), ""]
            _write_csv(folder / f"scores_{task}.csv", rows_of_surface(own, nearest))
        if any(value is not None for point in points for value in point.values.values()):
            sweep_plots.draw(folder, points, folder / f"scores_{task}.png", task, is_task=True)
    if runs:
        _write_csv(folder / "scores.csv", rows_of_runs(runs, keys, papers))
        yield from [*lines_of_runs(runs, papers), ""]
    finished = sum(result.finished for result in found)
    yield (
        f"{len(runs)} of {len(found)} runs are scored. Skipped: {len(found) - finished} not "
        f"finished, {finished - len(runs)} finished without these scores"
    )
    if runs and limit:
        yield f"These scores are of the first {limit} documents of each task only"
    if runs:
        yield f"scores: {folder / 'scores.csv'}; of each task: {folder / 'scores_TASK.png'}"


def _write_csv(path: Path, rows: list[list[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
