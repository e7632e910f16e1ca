"""Plots of losses or scores over the bag size, with a line for each step ratio, as in the paper."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

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
                (label, handle)
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
    for r, color in colors.items():
        cells = [(r, s) for s in surface.bag_sizes if (r, s) in surface.values]
        if cells:
            axes.errorbar(
                [s for _, s in cells],
                [surface.values[cell] for cell in cells],
                [surface.errors.get(cell, 0.0) for cell in cells] if surface.errors else None,
                fmt="o-",
                color=color,
                markersize=3,
                capsize=3,
                label=f"r = {r:g}",
            )
    baseline = surface.baseline
    if baseline is None:
        return
    axes.axhline(baseline, color="black", linestyle="--", linewidth=1, label="baseline")
    if error := surface.errors.get(BASELINE_CELL):
        axes.axhspan(baseline - error, baseline + error, color="black", alpha=0.1, linewidth=0)
    if not surface.higher_is_better:
        gain = baseline - surface.values[surface.best]
        if gain > 0:  # leave away what is far above the baseline
            axes.set_ylim(baseline - 1.1 * gain, baseline + 0.7 * gain)


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
    for label, points in lines.items():
        ordered = sorted(points) if numbers else [(str(x), *rest) for x, *rest in points]
        xs, ys, *errors = zip(*ordered, strict=True)
        yerr = errors[0] if errors else None
        axes.errorbar(xs, ys, yerr, fmt="o-", capsize=3, label=label)
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
