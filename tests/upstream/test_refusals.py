"""What upstream refuses while it builds a job, in one line; what is a fault stays a traceback."""

import json

import pytest
import torch
from torchtitan.config import ActivationCheckpoint, JobConfig, Model
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.protocols.model_converter import build_model_converters

from jobs import ROOT
from torchtitan.experiments.tst.core import Schedule
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer
from torchtitan.experiments.tst.upstream import refusals
from torchtitan.experiments.tst.upstream.refusals import refusals_as_config_errors


def checkpoint_what_has_no_layers():
    apply_ac(torch.nn.Module(), ActivationCheckpoint())


def convert_with(name):
    build_model_converters(JobConfig(model=Model(converters=[name])), None)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: ParallelDims(3, 1, 1, 1, 1, 1, 1, world_size=4),
            r"AssertionError: Invalid parallel dims: dp_replicate\(3\) .* "
            r"\(torchtitan/distributed/parallel_dims\.py, line \d+\)",
        ),
        (lambda: convert_with("fp4"), r"KeyError: 'fp4' \(torchtitan/protocols/model_converter"),
        (lambda: ParallelDims(0, 1, 1, 1, 1, 1, 1, 1), r"Parallelism degree should be >= 1"),
    ],
)
def test_errors_of_upstream(call, text):
    with (
        pytest.raises(ConfigError, match=f"^TorchTitan refuses this job: .*{text}") as error,
        refusals_as_config_errors(),
    ):
        call()
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: [][0], IndexError),  # of this file
        (lambda: Schedule.of([4], [2], scale="batch").batch_shape(1, 4, 33), ValueError),  # of ours
        (lambda: torch.zeros(2).view(3), RuntimeError),  # of torch, called by this file
        (
            checkpoint_what_has_no_layers,
            AttributeError,
        ),  # of torch, called by upstream, and no word on an argument
    ],
)
def test_other_errors_stay_what_they_are(call, kind):
    with pytest.raises(kind) as error, refusals_as_config_errors():
        call()
    assert not isinstance(error.value, ConfigError)


def test_ours_stay_ours_in_the_folder_of_upstream(monkeypatch):
    """As pip installs them."""
    monkeypatch.setattr(refusals, "_UPSTREAM", f"{ROOT}/torchtitan/")
    test_other_errors_stay_what_they_are(
        lambda: Schedule.of([4], [2], scale="batch").batch_shape(1, 4, 33), ValueError
    )


def test_a_trainer_that_upstream_refuses(make_config, one_process, monkeypatch):
    """What no check of ours knows."""
    monkeypatch.setattr(SuperpositionTrainer, "check", lambda self, job_config: None)
    with pytest.raises(ConfigError, match=r"refuses this job: Optimizer SGD not added"):
        SuperpositionTrainer(make_config("--optimizer.name=SGD"))


def refuse():
    raise NotImplementedError("it has no context parallelism")


def test_code_of_ones_own_may_refuse():
    text = r"^your code refuses this job: it has no .* \(.*test_refusals\.py, line \d+\)$"
    with pytest.raises(ConfigError, match=text), refusals_as_config_errors():
        refuse()


def at(path):
    """The function, as if it were in another file."""
    return refuse.__code__.replace(co_filename=str(path))


@pytest.mark.parametrize(
    "path",
    [
        "/home/me/.local/lib/python3.11/site-packages/wandb/sdk.py",
        "/usr/lib/python3/dist-packages/yaml/loader.py",
        json.__file__,
        torch.nn.__file__,
        ROOT / "torchtitan/experiments/tst/core/bags.py",
        "<string>",
    ],
)
def test_other_code_does_not_refuse(path):
    with pytest.raises(NotImplementedError), refusals_as_config_errors():
        exec(at(path))


def test_a_folder_with_a_similar_name_is_ones_own():
    similar = str(ROOT / "torchtitan/experiments/tst_of_mine/model.py")
    with pytest.raises(ConfigError, match="your code refuses"), refusals_as_config_errors():
        exec(at(similar))
