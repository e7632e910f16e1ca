"""From the keys of [superposition] to the steps of each stage."""

import pytest
import tomli_w

from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.config.sections import Superposition
from torchtitan.experiments.tst.config.stages import steps_of_stages
from torchtitan.experiments.tst.core import Schedule


@pytest.mark.parametrize(
    ("ratio", "total", "boundary"),
    [(0.3, 20_000, 6_000), (0.29, 100, 29), (0.0, 100, 0), (0.3, 100_000, 30_000)],
)
def test_the_boundary_of_a_ratio(ratio, total, boundary):
    assert steps_of_stages(Superposition(bag_size=6, step_ratio=ratio), total) == [boundary]
    for stages in ([6], [8, 4, 2], [8, 7, 6, 5, 4, 3, 2]):
        equal = steps_of_stages(Superposition(bag_size=stages, step_ratio=ratio), total)
        assert sum(equal) == boundary
        assert max(equal) - min(equal) <= 1


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"step_ratio": 0.3}, [300, 300, 300]),
        ({"step_ratio": 0.0001}, [0, 0, 0]),
        ({"step_ratio": 0.0003}, [0, 1, 0]),
        ({"step_ratio": [0.1, 0.2, 0.05]}, [300, 600, 150]),
        ({"step_ratio": [0.1, 0.1, 0.1]}, [300, 300, 300]),
        ({"step_ratio": [0.0005, 0.0005, 0.0005]}, [2, 1, 1]),
        ({"step_ratio": [0, 0.2, 0]}, [0, 600, 0]),
        ({"steps": 100}, [33, 34, 33]),
        ({"steps": [5, 0, 7]}, [5, 0, 7]),
    ],
    ids=str,
)
def test_steps_of_stages(values, steps):
    assert steps_of_stages(Superposition(bag_size=[8, 4, 2], **values), 3000) == steps


@pytest.mark.parametrize(
    ("of_toml", "arguments"),
    [
        ({"bag_size": [8, 4], "step_ratio": 0.2}, ["bag_size=8,4", "step_ratio=0.2"]),
        ({"bag_size": [8, 4], "step_ratio": 0.2}, ["bag_size=[8, 4]", "step_ratio=0.2"]),
        ({"bag_size": [8, 4], "step_ratio": [0.1, 0.1]}, ["bag_size=8,4", "step_ratio=0.1,0.1"]),
        ({"bag_size": [8, 4], "steps": [10, 10]}, ["bag_size=8,4", "steps=[10,10]"]),
        ({"bag_size": [4], "steps": [10]}, ["bag_size=[4]", "steps=[10]"]),
        ({"bag_size": 4, "steps": 10}, ["bag_size=4", "steps=10"]),
    ],
    ids=str,
)
def test_toml_and_command_line(tmp_path, of_toml, arguments):
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps({"training": {"steps": 100}, "superposition": of_toml}))
    from_toml = SuperpositionConfigManager().parse_args([f"--job.config_file={path}"])
    options = [f"--superposition.{argument}" for argument in arguments]
    from_options = SuperpositionConfigManager().parse_args(["--training.steps=100", *options])
    assert from_toml.superposition == from_options.superposition == Superposition(**of_toml)
    expected = Schedule.of([8, 4], [10, 10]) if "8" in str(of_toml) else Schedule.of([4], [10])
    assert build_schedule(from_toml) == build_schedule(from_options) == expected


def test_the_command_line_goes_over_the_toml(tmp_path):
    path = tmp_path / "job.toml"
    section = {"bag_size": [8, 4], "step_ratio": [0.1, 0.2]}
    path.write_text(tomli_w.dumps({"training": {"steps": 100}, "superposition": section}))
    config = SuperpositionConfigManager().parse_args(
        [
            f"--job.config_file={path}",
            "--superposition.bag_size=4",
            "--superposition.step_ratio=None",
            "--superposition.steps=7",
        ]
    )
    assert build_schedule(config) == Schedule.of([4], [7])
