"""What compare says of the experts of runs."""

import re
from pathlib import Path

import pytest

from jobs import ON
from torchtitan.experiments.tst.core import Schedule
from torchtitan.experiments.tst.metrics_file import METRICS_FILE
from torchtitan.experiments.tst.results.comparison import compare
from torchtitan.experiments.tst.results.curves import (
    Curves,
    ExpertShares,
    Place,
    Point,
    read_curves,
)
from torchtitan.experiments.tst.results.report import write_comparison
from torchtitan.experiments.tst.results.tables import rows_of_experts
from torchtitan.experiments.tst.training.tensorboard import LAYOUT

QWEN3 = ("--model.name=qwen3", "--model.flavor=debugmodel_moe_tiny")


def shares(step, largest, smallest, dead=0):
    at = Place(step, step, step, step, step)
    return ExpertShares(at, dict(enumerate(largest)), dict(enumerate(smallest)), 0.9, dead)


def run(name, boundary, experts=()):
    stages = Schedule.of([4], [boundary]).stages if boundary else ()
    losses = [Point(Place(step, step, step, step, step), 3.0) for step in (1, boundary or 2, 9)]
    return Curves(name, Path(), stages, losses, losses, experts=tuple(experts))


def test_rows():
    experts = [shares(1, [30, 40], [10, 5]), shares(2, [50, 20], [9, 9])]
    experts += [shares(3, [26, 27], [24, 23]), shares(9, [31, 60], [20, 0], 2)]
    rows = rows_of_experts([run("tst", 2, experts), run("dense", 0), run("moe", 0, experts[-1:])])
    assert rows[1:] == [
        ["tst", "50.0 %", "27.0 %", "60.0 %", "0.0 %", "2"],
        ["moe", "-", "-", "60.0 %", "0.0 %", "2"],
    ]
    assert rows_of_experts([run("dense", 0)]) == []


@pytest.mark.parametrize("source", ["metrics.jsonl", "TensorBoard"])
def test_of_a_run(train, tmp_path, source):
    lines = train(*QWEN3, *ON, "--metrics.enable_tensorboard")
    folder = tmp_path / "run"
    if source == "TensorBoard":
        (folder / METRICS_FILE).unlink()
    curves = read_curves(folder)
    assert len(curves.experts) == len(lines)
    for line, of_step in zip(lines, curves.experts, strict=True):
        assert of_step.largest == {
            layer: pytest.approx(line[f"experts/largest_share(%)/layer_{layer}"])
            for layer in range(2)
        }
        assert max(of_step.largest.values()) == pytest.approx(line["experts/largest_share(%)"])
    ((_, (chart,)),) = [
        tags
        for charts in LAYOUT.values()
        for name, tags in charts.items()
        if name.startswith("experts")
    ]
    assert sum(bool(re.search(chart, tag)) for tag in lines[0]) == 2
    report, *plots = write_comparison(
        [curves], compare([curves]), tmp_path / "report", "tst compare"
    )
    assert [plot.name for plot in plots] == ["loss.png", "experts.png"]
    assert all(plot.stat().st_size > 10_000 for plot in plots)
    assert "<h2>Experts</h2>" in report.read_text()
