"""The downstream scores of a sweep as tables: of each task over r and s, and of the runs."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..paper import BASELINE_CELL, Cell, Surface
from .scores import Score
from .sweep import Result, values_of
from .sweep_plots import cell_of
from .tables import aligned

_SUPERPOSITION = "superposition."
WITHIN_ERROR = "≈"


@dataclass(frozen=True)
class ScoredRun:
    """A finished run with the scores of its last checkpoint.

    Attributes:
        number: number of the run in the sweep.
        result: name, varied values and losses.
        scores: score by task.
    """

    number: int
    result: Result
    scores: Mapping[str, Score]


def lines_of_surface(own: Surface, nearest: Surface | None) -> list[str]:
    """Return the scores of a sweep on a task over r and s, next to the paper's at the same cells.

    Args:
        own: scores of the sweep.
        nearest: scores of the paper; None if the paper does not have the task.
    """
    sizes = own.bag_sizes
    rows = [["r", *(f"s = {s}" for s in sizes)]]
    width = max(len(f"{r:g}") for r in own.ratios) + 2
    for r in own.ratios:
        cells = [(r, s) for s in sizes]
        block = [["score", *(_text(_score(own, cell)) for cell in cells)]]
        if own.baseline is not None:
            block.append(["over the baseline", *(_lead(own, cell) for cell in cells)])
        if nearest:
            block.append(["paper's score", *(_text(_score(nearest, cell)) for cell in cells)])
            block.append(["over its baseline", *(_lead(nearest, cell) for cell in cells)])
        for number, (name, *of_row) in enumerate(block):
            rows.append([f"{'' if number else f'{r:g}':{width}}{name}", *of_row])
    of_paper = f"paper: {nearest.title}" if nearest else "not in the paper"
    baselines = [f"this sweep's {_text(_score(own, BASELINE_CELL))}"]
    if nearest:
        baselines.append(f"the paper's {_text(_score(nearest, BASELINE_CELL))}")
    return [
        f"{own.task}, score (%) ± standard error; {of_paper}",
        *aligned(rows),
        f"baseline: {', '.join(baselines)}",
    ]


def rows_of_surface(own: Surface, nearest: Surface | None) -> list[list[Any]]:
    """Return the cells of ``scores_TASK.csv``: three blocks in the layout of the paper's tables.

    Args:
        own: scores of the sweep.
        nearest: scores of the paper; None if the paper does not have the task.
    """
    sizes, ratios = [1, *own.bag_sizes], [0.0, *own.ratios]
    blocks: list[tuple[str, Callable[[Cell], float | None]]] = [
        ("score(%)", own.at),
        ("standard_error(%)", own.errors.get),
    ]
    if nearest:
        blocks.append(("paper(%)", nearest.at))
    rows: list[list[Any]] = [["quantity", "r", *sizes]]
    for name, at in blocks:
        rows += [[name, r, *(at((r, s)) for s in sizes)] for r in ratios]
    return rows


def lines_of_runs(runs: Sequence[ScoredRun], papers: Mapping[str, Surface]) -> list[str]:
    """Return the scores and the average ranks of runs, marked if they are near the baseline's.

    Args:
        runs: at least one run; all have the same tasks.
        papers: the paper's nearest surface by task; empty for a sweep over other keys.
    """
    tasks = list(runs[0].scores)
    ranks, of_paper = average_ranks(runs), paper_ranks(runs, papers)
    rows = [["run", *(f"{task}  " for task in tasks), "average rank"]]
    rows[0] += ["paper's average rank"] if papers else []
    for run, rank, paper_rank in zip(runs, ranks, of_paper, strict=True):
        baseline = _baseline_of(run, runs)
        row = [run.result.name]
        for task, score in run.scores.items():
            near = baseline and score.minus(baseline.scores[task]).is_within_error
            row.append(f"{score} {WITHIN_ERROR if near else ' '}")
        row.append(f"{rank:.2f}")
        row += ["-" if paper_rank is None else f"{paper_rank:.2f}"] if papers else []
        rows.append(row)
    notes = ["Rank 1 is the highest score; equal scores share the mean of their ranks"]
    if any(WITHIN_ERROR in cell for row in rows for cell in row):
        notes.append(f"{WITHIN_ERROR}: nearer to its baseline than the difference's standard error")
    if papers:
        number = sum(rank is not None for rank in of_paper)
        notes.append(
            f"The paper's ranks are among the {number} runs that it has here, on its tasks"
        )
    return [*aligned(rows), *notes]


def rows_of_runs(
    runs: Sequence[ScoredRun], keys: Sequence[str], papers: Mapping[str, Surface]
) -> list[list[Any]]:
    """Return the cells of ``scores.csv``.

    Args:
        runs: at least one run; all have the same tasks.
        keys: the varied keys.
        papers: the paper's nearest surface by task; empty for a sweep over other keys.
    """
    columns = [name for task in runs[0].scores for name in (f"{task}(%)", f"{task}_error(%)")]
    rows: list[list[Any]] = [["run", *keys, *columns, "average_rank", "paper_average_rank"]]
    ranks = zip(average_ranks(runs), paper_ranks(runs, papers), strict=True)
    for run, of_run in zip(runs, ranks, strict=True):
        scores = [cell for score in run.scores.values() for cell in (score.value, score.error)]
        rows.append([run.number, *values_of(run.result), *scores, *of_run])
    return rows


def average_ranks(runs: Sequence[ScoredRun]) -> list[float]:
    """Return the mean over the tasks of each run's rank; rank 1 is the highest score."""
    return _average_ranks([[score.value for score in run.scores.values()] for run in runs])


def paper_ranks(runs: Sequence[ScoredRun], papers: Mapping[str, Surface]) -> list[float | None]:
    """Return the average rank of the paper's run at the r and s of each run.

    The paper's runs at these r and s are ranked among each other. It is None where the paper lacks
    the run on any task.

    Args:
        runs: runs of a sweep over s and r.
        papers: the paper's surface by task; if empty, all are None.
    """
    if not papers:
        return [None] * len(runs)
    cells = [cell_of(run.result.values) for run in runs]
    known: dict[Cell, list[float]] = {}
    for cell in cells:
        scores = [s for surface in papers.values() if (s := surface.at(cell)) is not None]
        if len(scores) == len(papers):
            known[cell] = scores
    ranks = dict(zip(known, _average_ranks(list(known.values())), strict=True))
    return [ranks.get(cell) for cell in cells]


def _average_ranks(scores: Sequence[Sequence[float]]) -> list[float]:
    """Return the average rank of each run, given its scores on the same tasks."""
    columns = [_ranks(column) for column in zip(*scores, strict=True)]
    return [statistics.mean(ranks) for ranks in zip(*columns, strict=True)]


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, the highest first; equal values share the mean rank."""
    return [
        sum(other > value for other in values) + (values.count(value) + 1) / 2 for value in values
    ]


def _baseline_of(run: ScoredRun, runs: Sequence[ScoredRun]) -> ScoredRun | None:
    """Return the baseline that differs from a run in superposition only; None without one."""

    def without_superposition(values: Mapping[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in values.items() if not k.startswith(_SUPERPOSITION)}
        return rest | dict.fromkeys(values.keys() - rest.keys())

    values = without_superposition(run.result.values)
    for other in runs:
        if other is not run and other.result.values == values:
            return other
    return None


def _score(surface: Surface, cell: Cell) -> Score | None:
    value = surface.at(cell)
    return None if value is None else Score(value, surface.errors.get(cell))


def _lead(surface: Surface, cell: Cell) -> str:
    score, baseline = _score(surface, cell), _score(surface, BASELINE_CELL)
    return score.minus(baseline).as_difference if score and baseline else "-"


def _text(score: Score | None) -> str:
    return "-" if score is None else str(score)
