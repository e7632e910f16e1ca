"""What must fit together in the stages of a job."""

import pytest
import tomli_w

from torchtitan.experiments.tst.checks.job import check_config
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.errors import ConfigError

BATCH = "scale=batch"


def section(*arguments):
    return [f"--superposition.{argument}" for argument in arguments]


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (
            ["bag_size=8,4", "steps=1,1,1"],
            "superposition.steps = [1, 1, 1]: has 3 values, but superposition.bag_size = [8, 4] "
            "has 2; give one for each bag size, or one number for all stages together",
        ),
        (
            ["bag_size=8", "step_ratio=0.1,0.2"],
            "superposition.step_ratio = [0.1, 0.2]: has 2 values, but superposition.bag_size = 8 "
            "has 1; give one for each",
        ),
        (
            ["bag_size=8,4", "step_ratio=0.5,0.5"],
            "superposition.step_ratio = [0.5, 0.5]: 6 superposition steps must be fewer than "
            "training.steps = 6",
        ),
        (
            ["bag_size=8,4", "steps=3,3"],
            "superposition.steps = [3, 3]: 6 superposition steps must be fewer than",
        ),
        (["bag_size=8,4"], "superposition.bag_size = [8, 4]: needs superposition.step_ratio"),
        (
            ["bag_size=8,4", "steps=1,1", "step_ratio=0.1"],
            "superposition.step_ratio = 0.1 and superposition.steps = [1, 1]: give one of the two",
        ),
        (["bag_size=8,1", "steps=2"], "superposition.bag_size = [8, 1]: must be"),
        (["bag_size=[1]", "steps=2"], "superposition.bag_size = [1]: must be"),
        (["bag_size=8,4", "steps=2,-1"], "superposition.steps = [2, -1]: must be"),
        (["bag_size=8,4", "step_ratio=0.2,1"], "superposition.step_ratio = [0.2, 1.0]: must be"),
        (
            ["bag_size=8,3", "steps=2", BATCH],
            "training.seq_len = 32: must be a multiple of the bag size 3",
        ),
        (
            ["bag_size=8,64", "steps=2", "mode=output"],
            "superposition.bag_size = [8, 64]: the bag size 64 must be at most training.seq_len",
        ),
        (
            ["bag_size=2,8", "steps=2", BATCH, "context"],
            "training.seq_len = 32: gives 4 latents in bags of 8, which must be a multiple of 8",
        ),
        (
            ["bag_size=4,2", "steps=2", "checkpoint_each_stage"],
            "superposition.checkpoint_each_stage = True: needs checkpoint.enable",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_stages_that_do_not_fit(make_config, args, error):
    context = ["--parallelism.context_parallel_degree=4"] * ("context" in args)
    config = make_config(*section(*(arg for arg in args if arg != "context")), *context)
    with pytest.raises(ConfigError) as raised:
        check_config(config, 4)
    assert str(raised.value).startswith(error)


@pytest.mark.parametrize("off", ["bag_size=1", "step_ratio=0"])
def test_a_job_without_stages_keeps_the_checkpoints_of_none(make_config, off):
    args = [] if off == "bag_size=1" else ["bag_size=8,4"]
    check_config(make_config(*section(*args, off, "checkpoint_each_stage")), 4)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"bag_size": []}, "superposition.bag_size = []: must be an integer of at least 1 (1 "),
        ({"bag_size": [8, "4"]}, "superposition.bag_size = [8, '4']: must be an integer or a list"),
        ({"bag_size": [8, 4.0]}, "superposition.bag_size = [8, 4.0]: must be an integer or a list"),
        ({"bag_size": [[8, 4]]}, "superposition.bag_size = [[8, 4]]: must be an integer or a list"),
        ({"step_ratio": ["0.1"]}, "superposition.step_ratio = ['0.1']: must be a number or a list"),
        ({"steps": [True]}, "superposition.steps = [True]: must be an integer or a list"),
    ],
    ids=str,
)
def test_lists_of_a_toml(tmp_path, values, error):
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps({"superposition": values}))
    with pytest.raises(ConfigError) as raised:
        SuperpositionConfigManager().parse_args([f"--job.config_file={path}"])
    assert str(raised.value).startswith(error)


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        (
            "bag_size=8,x",
            "superposition.bag_size = '8,x': must be an integer or a list of integers",
        ),
        ("bag_size=", "superposition.bag_size = '': must be an integer or a list of integers"),
        ("bag_size=[8,4", "superposition.bag_size = '[8,4': must be an integer or a list"),
        ("step_ratio=0.1,", "superposition.step_ratio = '0.1,': must be a number or a list"),
        ("steps=1.5,2", "superposition.steps = '1.5,2': must be an integer or a list of integers"),
    ],
)
def test_lists_of_a_command_line(argument, error):
    with pytest.raises(ConfigError) as raised:
        SuperpositionConfigManager().parse_args(section(argument))
    assert str(raised.value).startswith(error)
