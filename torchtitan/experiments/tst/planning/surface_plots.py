"""Plots of the loss over the bag size, with a line for each step ratio, as in the paper."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from ..paper import Surface


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
        for r, color in colors.items():
            points = [(s, loss) for s in surface.bag_sizes if (loss := surface.losses.get((r, s)))]
            if points:
                axes.plot(
                    *zip(*points, strict=True), "o-", color=color, markersize=3, label=f"r = {r:g}"
                )
        if surface.baseline is not None:
            axes.axhline(
                surface.baseline, color="black", linestyle="--", linewidth=1, label="baseline"
            )
            gain = surface.baseline - min(surface.losses.values())
            if gain > 0:  # leave away what is far above the baseline
                axes.set_ylim(surface.baseline - 1.1 * gain, surface.baseline + 0.7 * gain)
        if mark:
            axes.axvline(mark, color="tab:red", linewidth=1, label=f"s = {mark:.3g}")
        axes.set(title=title, xlabel="bag size s", ylabel="final loss (nats per token)")
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


def draw_lines(
    lines: dict[str, list[tuple[Any, float]]], x_label: str, y_label: str, output: Path
) -> None:
    """Draw a line for each label. The x axis is logarithmic for numbers that span a factor of 4."""
    figure, axes = plt.subplots(figsize=(6.5, 5), layout="constrained")
    xs = [x for points in lines.values() for x, _ in points]
    numbers = all(isinstance(x, (int, float)) for x in xs)
    for label, points in lines.items():
        ordered = sorted(points) if numbers else [(str(x), y) for x, y in points]
        axes.plot(*zip(*ordered, strict=True), "o-", label=label)
    if numbers and min(xs) > 0 and max(xs) >= 4 * min(xs):
        axes.set_xscale("log")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend(fontsize="small")
    figure.savefig(output, dpi=150)
    plt.close(figure)


def _spread(number: int) -> list[float]:
    return [index / max(1, number - 1) for index in range(number)]
