"""Plots of losses or scores over the bag size, with a line for each step ratio, as in the paper."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from ..paper import BASELINE_CELL, Surface


def draw_surfaces(surfaces: dict[str, Surface], output: Path, mark: float | None = None) -> None:
    """Draw a panel for each surface; a value of r has the same color in all.

    Args:
        surfaces: surfaces by the title of their panel.
        output: the PNG file to write.
        mark: a bag size to mark with a line.
    """
    ratios = sorted({r for surface in surfaces.values() for r in surface.ratios if r < 1})
    colors = dict(zip(ratios, plt.get_cmap("viridis")(_spread(len(ratios))), strict=True))
    figure, panels = plt.subplots(
        1, len(surfaces), figsize=(6.5 * len(surfaces), 5), layout="constrained", squeeze=False
    )
    for axes, (title, surface) in zip(panels[0], surfaces.items(), strict=True):
        _draw_surface(axes, surface, colors)
        if mark:
            axes.axvline(mark, color="tab:red", linewidth=1, label=f"s = {mark:.3g}")
        axes.set(title=title, xlabel="bag size s", ylabel=surface.quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    labels = dict(
        sorted(
            (
                (label, handle[0] if isinstance(handle, ErrorbarContainer) else handle)
                for axes in panels[0]
                for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
            ),
            key=lambda entry: entry[0],
        )
    )
    figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize="small")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _draw_surface(axes: Axes, surface: Surface, colors: dict[float, Any]) -> None:
    ratios = [r for r in surface.ratios if r in colors]
    for number, r in enumerate(ratios):
        cells = [(r, s) for s in surface.bag_sizes if (r, s) in surface.values]
        points: list[tuple[float, ...]] = [(s, surface.values[r, s]) for r, s in cells]
        if surface.errors:
            points = [
                (*point, surface.errors.get(cell, 0.0))
                for point, cell in zip(points, cells, strict=True)
            ]
        style = {"color": colors[r], "markersize": 3, "label": f"r = {r:g}"}
        _draw_line(axes, points, number - (len(ratios) - 1) / 2, **style)
    baseline = surface.baseline
    if baseline is None:
        return
    axes.axhline(baseline, color="black", linestyle="--", linewidth=1, label="baseline")
    if error := surface.errors.get(BASELINE_CELL):
        axes.axhspan(
            baseline - error,
            baseline + error,
            color="black",
            alpha=0.1,
            linewidth=0,
            label="± standard error",
        )
    if not surface.higher_is_better:
        gain = baseline - surface.values[surface.best]
        if gain > 0:  # leave away what is far above the baseline
            axes.set_ylim(baseline - 1.1 * gain, baseline + 0.7 * gain)


def _draw_line(axes: Axes, points: list[tuple[Any, ...]], shift: float, **style: Any) -> None:
    """Draw a line through points (x, y), or (x, y, error).

    Lines with errors are shifted by some points (1/72 inch) each, so that no bar hides another.
    """
    xs, ys, *errors = zip(*points, strict=True)
    yerr = errors[0] if errors else None
    drawn = axes.errorbar(xs, ys, yerr, fmt="o-", capsize=3, elinewidth=1, **style)
    if errors:
        to_the_right = ScaledTranslation(3 * shift / 72, 0, axes.figure.dpi_scale_trans)
        for artist in drawn.get_children():
            artist.set_transform(axes.transData + to_the_right)


def draw_lines(
    lines: dict[str, list[tuple[Any, ...]]], x_label: str, y_label: str, output: Path
) -> None:
    """Draw a line for each label. The x axis is logarithmic for numbers that span a factor of 4.

    Args:
        lines: the points of each line: (x, y) or, with the error of y, (x, y, error).
        x_label: label of the x axis.
        y_label: label of the y axis.
        output: the PNG file to write.
    """
    figure, axes = plt.subplots(figsize=(6.5, 5), layout="constrained")
    all_xs = [x for points in lines.values() for x, *_ in points]
    numbers = all(isinstance(x, (int, float)) for x in all_xs)
    for number, (label, points) in enumerate(lines.items()):
        ordered = sorted(points) if numbers else [(str(x), *rest) for x, *rest in points]
        _draw_line(axes, ordered, number - (len(lines) - 1) / 2, label=label)
    if numbers and min(all_xs) > 0 and max(all_xs) >= 4 * min(all_xs):
        axes.set_xscale("log")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend(fontsize="small")
    figure.savefig(output, dpi=150)
    plt.close(figure)


def _spread(number: int) -> list[float]:
    return [index / max(1, number - 1) for index in range(number)]
