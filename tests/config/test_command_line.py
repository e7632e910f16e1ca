"""A command line that cannot be read is an error of one line, not a box of ten."""

import importlib

import pytest

from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.errors import ConfigError


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--training.steps=abc"], "training.steps = 'abc': must be an integer"),
        (["--training.steps", "1.5"], "training.steps = '1.5': must be an integer"),
        (["--optimizer.lr=high"], "optimizer.lr = 'high': must be a number"),
        (
            ["--training.steps=5", "--optimizer.implementation=fuse"],
            "optimizer.implementation = 'fuse': must be one of for-loop, foreach, fused",
        ),
        (["--training.stepz=1"], "training.stepz = '1': unknown key; did you mean steps?"),
        (["--trainin.steps=1"], "trainin.steps = '1': unknown key"),
        (["--validation.steps=0"], "validation.steps = 0: must be an integer of at least 1, or -1"),
        (
            ["--parallelism.context-parallel-load-balancer="],
            "parallelism.context_parallel_load_balancer = '': must be headtail or ptrr",
        ),
        (
            ["--training.batch_size", "3"],
            "training.batch_size = '3' (now training.local_batch_size): a key of an older "
            "TorchTitan; rename or remove as shown",
        ),
        (["--training.compile"], "training.compile = True (now compile.enable): a key of"),
        (
            ["--compile.enable=true"],
            "--compile.enable=true: a switch takes no value; use --compile.enable for true, "
            "--compile.no-enable for false",
        ),
        (["--training.steps"], "command line: Missing value for argument '--training.steps'."),
        (["steps"], "command line: Unrecognized options: steps"),
        (["--job.config_file"], "command line: Missing value for argument '--job.config-file'"),
    ],
)
def test_refused_in_one_line(capfd, args, message):
    with pytest.raises(ConfigError) as error:
        SuperpositionConfigManager().parse_args(args)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert "help" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_fault():
    config = SuperpositionConfigManager().parse_args(
        ["--debug.seed=None", "--compile.no-enable", "--model.converters=a,b", "--debug.seed", "-1"]
    )
    assert config.model.converters == ["a", "b"]
    assert config.debug.seed == -1


@pytest.mark.parametrize("name", ["models", "data.datasets"])
def test_an_extension_of_older_versions_is_found_where_it_is_now(name):
    old = f"--experimental.custom_import=torchtitan.experiments.tst.{name}"
    config = SuperpositionConfigManager().parse_args([old])
    assert config.experimental.custom_import == "torchtitan.experiments.tst.extension"
    importlib.import_module(config.experimental.custom_import)
