"""Plot the losses of runs over several axes, as in the paper, their scores and their experts."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from ..core import Stage
from .comparison import Axis, Comparison, comparable_points, flops
from .curves import Curves, Point, ScoredCheckpoint
from .score_comparison import tasks_of

PANELS: list[tuple[str, str, Axis]] = [
    ("Over steps", "steps", lambda at: at.step),
    ("Over data tokens", "data tokens", lambda at: at.data_tokens),
    ("Over hours, on the hardware of each run", "hours of training", lambda at: at.hours),
    ("Equal FLOPs, from where the runs cross", "FLOPs", flops),
]


def draw_curves(runs: Sequence[Curves], comparison: Comparison, output: Path) -> None:
    """Draw losses over steps, data tokens and hours, and over FLOPs where the runs cross.

    Args:
        runs: any number of runs.
        comparison: comparison of the runs.
        output: the PNG file to write.
    """
    compared = [comparable_points(run, comparison.kind) for run in runs]
    figure, panels = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for panel, (title, label, axis) in zip(panels.flat, PANELS, strict=True):
        zoom = axis is flops
        for index, (run, points) in enumerate(zip(runs, compared, strict=True)):
            color = f"C{index % 10}"
            if not zoom:
                _draw_training(panel, run, axis, color)
            _draw_comparable(panel, run, points, comparison.kind, axis, color)
        end = max(axis(run.end) for run in runs)
        start = _start_of_zoom(runs, comparison) if zoom else 0
        losses = [
            point.loss
            for run, points in zip(runs, compared, strict=True)
            for point in [*points, *([] if zoom else run.training)]
            # the losses of the first steps are far above
            if axis(point.at) >= max(start, 0.05 * end) and math.isfinite(point.loss)
        ]
        panel.set(title=title, xlabel=label, ylabel="loss (nats per token)", xlim=(start, end))
        if losses:
            margin = 0.05 * (max(losses) - min(losses)) or 0.1
            panel.set_ylim(min(losses) - margin, max(losses) + margin)
        panel.grid(alpha=0.3)
        if label == "data tokens":
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def draw_experts(runs: Sequence[Curves], output: Path) -> None:
    """Draw the largest and smallest share of an expert over steps, and those of each layer pale.

    Args:
        runs: any number of runs; those of dense models are skipped.
        output: the PNG file to write.
    """
    figure, panels = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    for index, run in enumerate(runs):
        color, steps = f"C{index % 10}", [shares.at.step for shares in run.experts]
        for panel, name, extreme in zip(panels, ("largest", "smallest"), (max, min), strict=True):
            of_steps = [getattr(shares, name) for shares in run.experts]
            for layer in of_steps[0] if of_steps else ():
                of_layer = [by_layer[layer] for by_layer in of_steps]
                panel.plot(steps, of_layer, color=color, alpha=0.3, linewidth=0.8)
            whole = [extreme(by_layer.values()) for by_layer in of_steps]
            panel.plot(steps, whole, color=color, label=run.name if of_steps else None)
            for stage in run.stages:
                panel.axvline(stage.last, color="gray", linestyle="--", linewidth=0.8)
            panel.set(title=f"{name.capitalize()} share of an expert", xlabel="steps")
            panel.set_ylabel("% of the router's choices")
            panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def draw_scores(runs: Sequence[Curves], output: Path) -> None:
    """Draw the scores of the checkpoints over FLOPs with standard errors, a panel for each task.

    Args:
        runs: any number of runs; at least one has scores.
        output: the PNG file to write.
    """
    runs_with_scores = [(f"C{n % 10}", run) for n, run in enumerate(runs) if run.scores]
    tasks = tasks_of(runs)
    columns = min(len(tasks), 4 if len(tasks) > 6 else 3)
    rows = math.ceil(len(tasks) / columns)
    width = max(6.5, min(13, 4.5 * columns))
    figure, panels = plt.subplots(
        rows, columns, figsize=(width, 3.6 * rows + 0.6), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(tasks) :]:
        panel.remove()
    for panel, task in zip(panels.flat, tasks, strict=False):
        for color, run in runs_with_scores:
            scored = [one for one in run.scores if one.evaluation.task == task]
            if scored:
                _draw_scores_of_run(panel, run, scored, color)
                _draw_stages(panel, run, flops, color)
        panel.set_title(_title_of_scores(runs, task), fontsize="medium")
        panel.set(xlabel="FLOPs", ylabel="score (%) ± standard error")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    # a run without scores on the first task is in another panel's legend
    by_label = {
        label: handle
        for panel in figure.axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        by_label.values(), by_label.keys(), loc="outside lower center", ncols=3, fontsize="small"
    )
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _title_of_scores(runs: Sequence[Curves], task: str) -> str:
    """Return a task with its metric and its number of documents, or all of them."""
    found = [s.evaluation for run in runs for s in run.scores if s.evaluation.task == task]
    metrics = sorted({evaluation.metric for evaluation in found})
    documents = sorted({evaluation.documents for evaluation in found})
    counts = " or ".join(f"{number:,}" for number in documents)
    return f"{task} ({' or '.join(metrics)}, {counts} documents)"


def _draw_scores_of_run(
    panel: Axes, run: Curves, scored: Sequence[ScoredCheckpoint], color: str
) -> None:
    """Draw a run's scores on a task, without a line across the boundary."""
    label: str | None = run.name
    for in_superposition in (False, True):
        part = [one for one in scored if (one.at.step <= run.boundary) == in_superposition]
        if part:
            scores = [one.evaluation.score for one in part]
            panel.errorbar(
                [flops(one.at) for one in part],
                [score.value for score in scores],
                [math.nan if score.error is None else score.error for score in scores],
                fmt="o-" if len(scored) < 100 else "-",
                color=color,
                markersize=3,
                elinewidth=0.8,
                capsize=2,
                label=label,
            )
            label = None


def _draw_training(panel: Axes, run: Curves, axis: Axis, color: str) -> None:
    """Draw the training loss, pale, dotted over bags, with lines at the ends of stages."""
    labels = {":": f"{run.name}: training, over bags", "-": f"{run.name}: training"}
    recovery = Stage(1, run.boundary + 1, round(run.end.step))
    for stage in (*run.stages, recovery):
        points = [p for p in run.training if stage.first <= p.at.step <= stage.last]
        if not points:
            continue
        style = "-" if stage.bag_size == 1 else ":"
        label = labels.pop(style, None)  # one label for all stages
        lines = panel.plot(*_coordinates(points, axis), style, color=color, label=label)
        plt.setp(lines, alpha=0.4, linewidth=1)
    _draw_stages(panel, run, axis, color)


def _draw_stages(panel: Axes, run: Curves, axis: Axis, color: str) -> None:
    """Draw a dashed line at the boundary, and a dotted line at each change of bag size before."""
    ends = {stage.last for stage in run.stages if stage.last < round(run.end.step)}
    for point in run.training:  # the last step of each stage is always logged
        if point.at.step in ends:
            line, width = ("--", 1.0) if point.at.step == run.boundary else (":", 0.8)
            panel.axvline(axis(point.at), color=color, linestyle=line, linewidth=width)


def _draw_comparable(
    panel: Axes, run: Curves, points: Sequence[Point], kind: str, axis: Axis, color: str
) -> None:
    """Draw the losses that are compared, in full color, without a line across the boundary."""
    if not points:
        return
    final = f"{points[-1].loss:.3f} at step {points[-1].at.step:,.0f}"
    label: str | None = f"{run.name}: {kind}, next token ({final})"
    style = "o-" if len(points) < 100 else "-"
    for in_superposition in (False, True):
        part = [p for p in points if (p.at.step <= run.boundary) == in_superposition]
        panel.plot(*_coordinates(part, axis), style, color=color, markersize=3, label=label)
        label = None


def _coordinates(points: Sequence[Point], axis: Axis) -> tuple[list[float], list[float]]:
    return [axis(point.at) for point in points], [point.loss for point in points]


def _start_of_zoom(runs: Sequence[Curves], comparison: Comparison) -> float:
    """Return the FLOPs somewhat before the first crossing, or half of them without a crossing."""
    crossings = [flops(pair.below_from) for pair in comparison.pairs if pair.below_from]
    return 0.7 * min(crossings) if crossings else 0.5 * max(flops(run.end) for run in runs)
