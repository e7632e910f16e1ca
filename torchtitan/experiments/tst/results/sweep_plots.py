"""Plots of a sweep's losses or scores: over s and r next to the paper's, or over its first key."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import paper
from ..config.job_config import superposition_section
from ..config.manager import SuperpositionConfigManager
from ..planning.plan import parameters_of
from ..planning.sweep import BAG_SIZE, BASELINE, STEP_RATIO, read_sweep, value_in_words


class Point(NamedTuple):
    """A finished run in a plot.

    Attributes:
        values: value of each varied key; None for keys without meaning in a baseline.
        y: loss in nats per token, or score in percent.
        error: standard error of y; None if it is unknown.
    """

    values: dict[str, Any]
    y: float
    error: float | None = None


def cell_of(values: dict[str, Any]) -> paper.Cell:
    """Return r and s of a run of a sweep over these two."""
    r, s = values[STEP_RATIO], values[BAG_SIZE]
    return paper.BASELINE_CELL if r is None else (r, s)


def is_surface(keys: Iterable[str], points: Sequence[Point]) -> bool:
    """Return whether points are of a sweep over r and s without stages, not all baselines."""
    if set(keys) != {BAG_SIZE, STEP_RATIO}:
        return False
    values = [value for point in points for value in point.values.values() if value is not None]
    return bool(values) and not any(isinstance(value, list) for value in values)


def surface_of(folder: Path, points: Sequence[Point], task: str | None = None) -> paper.Surface:
    """Return the surface of a sweep over r and s with at least one run with superposition.

    Args:
        folder: folder of the sweep.
        points: the finished runs.
        task: name of the task whose scores these are; None for losses.
    """
    by_cell = {cell_of(point.values): point.y for point in points}
    baseline = by_cell.pop(paper.BASELINE_CELL, None)
    errors = {cell_of(p.values): p.error for p in points if p.error is not None}
    return paper.Surface(*_what_runs_share(folder), baseline, by_cell, task, errors)


@functools.cache  # to read a config takes about a second, and each task has a surface
def _what_runs_share(folder: Path) -> tuple[str, int, int, str]:
    """Return the flavor, the number of parameters, the steps and the weighting of the runs."""
    runs = read_sweep(folder)["runs"]
    number = next(n for n, run in enumerate(runs) if run["values"][BAG_SIZE] is not None)
    job = f"--job.config_file={folder / f'{number}.toml'}"
    config = SuperpositionConfigManager().parse_args([job])
    weighting = superposition_section(config).weighting
    return config.model.flavor, parameters_of(config), config.training.steps, weighting


def nearest_to(own: paper.Surface) -> paper.Surface | None:
    """Return the paper's nearest surface of the same quantity; None for a task it does not have."""
    if own.task and own.task not in paper.SCORE_TASKS:
        return None
    return paper.nearest_surface(own.parameters, own.steps, own.weighting, own.task)


def draw(
    folder: Path, points: Sequence[Point], output: Path, name: str, *, is_task: bool = False
) -> None:
    """Plot y over s for each r next to the paper's, or over a sweep's first key.

    Args:
        folder: folder of the sweep.
        points: the finished runs.
        output: the PNG file to write.
        name: name of the loss, such as "validation loss", or of the task whose scores these are.
        is_task: whether ``name`` is that of a task.
    """
    from ..planning.surface_plots import draw_lines, draw_surfaces

    keys = list(read_sweep(folder)["vary"])
    if is_surface(keys, points):
        own = surface_of(folder, points, name if is_task else None)
        panels = {f"this sweep, {name}: {own.title}": own}
        if nearest := nearest_to(own):
            panels[f"paper: {nearest.title}"] = nearest
        draw_surfaces(panels, output)
        return
    has_errors = any(point.error is not None for point in points)
    lines: dict[str, list[tuple[Any, ...]]] = {}
    for point in points:
        x, *others = (point.values[key] for key in keys)
        label = ", ".join(
            BASELINE if value is None else f"{key} = {value_in_words(value)}"
            for key, value in zip(keys[1:], others, strict=True)
        )
        x = value_in_words(x) if isinstance(x, list) else BASELINE if x is None else x
        error = (point.error or 0.0,) if has_errors else ()
        lines.setdefault(label, []).append((x, point.y, *error))
    y_label = f"{name} score (%)" if is_task else f"final {name}"
    draw_lines(lines, keys[0], y_label, output)
