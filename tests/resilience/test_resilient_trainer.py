"""``ResilientTrainer`` alone, as any TorchTitan user may take it."""

import shutil

import pytest
import torch

from jobs import ON, SAVE, STEPS
from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.resilience.checkpoint.manifests import (
    CheckpointError,
    read_manifest,
)
from torchtitan.experiments.tst.resilience.step_check import NonFiniteError
from torchtitan.experiments.tst.resilience.stop import Stopped
from torchtitan.experiments.tst.resilience.trainer import ResilientTrainer


@pytest.fixture
def run(make_config, one_process):
    """Train; gives the loss of each step."""

    def train(*args, **hooks):
        losses = {}

        class Trainer(ResilientTrainer):
            def train_step(self, data_iterator):
                super().train_step(data_iterator)
                losses[self.step] = torch.stack(self._losses).sum().item()
                hooks.get("after_step", lambda trainer: None)(self)

            def forward_backward_step(self, **kwargs):
                loss = super().forward_backward_step(**kwargs)
                return hooks.get("loss", lambda trainer, loss: loss)(self, loss)

        trainer = Trainer(make_config(*args))
        try:
            trainer.train()
        finally:
            if torch.distributed.is_initialized():
                trainer.close()
                torch.distributed.destroy_process_group()
        return losses

    return train


def test_losses_are_upstreams_and_go_on_after_a_resume(run, finished, tmp_path):
    ordinary = finished().losses  # which test_parity compares with upstream's
    assert run(*SAVE) == ordinary
    folder = tmp_path / "run" / "checkpoint"
    for step in (5, 6):
        shutil.rmtree(folder / f"step-{step}")
    assert run(*SAVE) == {step: ordinary[step] for step in (5, 6)}
    assert (tmp_path / "run" / "config.toml").is_file()


def test_a_config_that_contradicts_the_checkpoint(run, make_config, tmp_path):
    run(*SAVE, "--training.steps=2")
    with pytest.raises(CheckpointError, match=r"training\.seq_len = 64, but 32 in the checkpoint"):
        run(*SAVE, "--training.seq_len=64")
    manifest = read_manifest(tmp_path / "run" / "checkpoint" / "step-2")
    assert manifest["data_tokens"] == 2 * 4 * 32 and not manifest["boundary"]
    check_job(make_config(*SAVE))  # of the trainer with superposition
    with pytest.raises(
        CheckpointError, match=r"superposition\.bag_size = 4, but 1 in the checkpoint"
    ):
        check_job(make_config(*ON, *SAVE))


def test_recovery_goes_on_without_superposition(run, whole, tmp_path):
    """From a checkpoint of the trainer that knows more: what it knows is not compared."""
    checkpoint = tmp_path / "run" / "checkpoint" / "step-4"
    shutil.copytree(whole.checkpoints / "step-4", checkpoint)
    # upstream's loader reads the same tokens from the same position
    assert run(*SAVE) == {step: whole.losses[step] for step in (5, 6)}
    with pytest.raises(CheckpointError, match=r"model\.flavor = 'demo_small', .* 'demo'"):
        run(*SAVE, "--model.flavor=demo_small", "--checkpoint.load_step=4")


def test_a_loss_that_is_no_number(run, tmp_path):
    def poison(trainer, loss):
        if trainer.step == 2:
            trainer._losses[-1] = loss.detach() * torch.nan
        return loss

    with pytest.raises(NonFiniteError, match=r"^step 2: loss not finite on ranks \[0\]"):
        run(*SAVE, loss=poison)
    names = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
    assert names == {"step-1"}


def test_a_request_to_stop(run, tmp_path):
    def stop(trainer):
        if trainer.step == 2:
            trainer.stop_request.signal = 10

    args = [arg.replace("interval=1", "interval=100") for arg in SAVE]
    with pytest.raises(Stopped):
        run(*args, after_step=stop)
    (checkpoint,) = (tmp_path / "run" / "checkpoint").iterdir()
    assert checkpoint.name in ("step-3", "step-4")
    assert max(run(*args)) == STEPS
