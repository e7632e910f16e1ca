"""Stages: several bag sizes in superposition, one after the other."""

import shutil

import pytest
import torch

from jobs import (
    IN_STAGES,
    SAVE,
    SAVE_LAST,
    STEPS,
    B,
    L,
    RecordingTrainer,
    column,
    load_full,
    losses,
    superposition,
)
from torchtitan.experiments.tst.core import BagLoss, fold
from torchtitan.experiments.tst.resilience.checkpoint import manifests
from torchtitan.experiments.tst.resilience.checkpoint.inventory import complete_steps
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

BAG_SIZES = [4, 2, 2, 3, 1, 1]  # of each step of IN_STAGES
SAME = ("step", "phase", "bag_size", "loss_metrics/global_avg_loss", "grad_norm", "n_tokens_seen")


def same_steps(lines, others):
    return all(column(lines, key) == column(others, key) for key in SAME)


def test_stages_of_equal_bag_size_are_one_stage(whole, train, tmp_path):
    """Bit for bit: losses, data, weights and optimizer."""
    assert same_steps(train(*superposition("4,4,4", 3), *SAVE), whole.lines)
    for step in (3, STEPS):
        mine, other = (
            load_full(folder / f"step-{step}")
            for folder in (tmp_path / "run" / "checkpoint", whole.checkpoints)
        )
        assert mine.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in mine.items())
    # and a checkpoint of one is a checkpoint of the other
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(whole.checkpoints / "step-2", tmp_path / "run" / "checkpoint" / "step-2")
    lines = train(*superposition("4,4", "1,2"), *SAVE)
    assert losses(lines) == {step: whole.losses[step] for step in (3, 4, 5, 6)}


def test_each_step_reads_and_scores_bags_of_its_stage(train):
    scored = []

    class Trainer(RecordingTrainer):
        def forward_backward_step(self, **kwargs):
            model = self.model_parts[0]
            tokens, ordinary_labels = self.read[-1]
            size = self.schedule.bag_size_at(self.step)
            inputs, labels = fold(tokens, ordinary_labels, size)
            with torch.no_grad():
                expected = BagLoss("mce")(model(inputs if size > 1 else tokens), labels).item()
            loss = super().forward_backward_step(**kwargs)
            scored.append((tuple(tokens.shape), loss.item(), expected))
            return loss

    lines = train(*IN_STAGES, trainer_class=Trainer)
    assert column(lines, "bag_size") == BAG_SIZES
    assert [shape for shape, _, _ in scored] == [(B, size * L) for size in BAG_SIZES]
    for _, loss, expected in scored:
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_stage_is_what_one_bag_size_does_from_there(staged, train, tmp_path):
    """Resumed at its beginning with its bag size alone, a run takes the same steps."""
    shutil.copytree(staged.checkpoints / "step-1", tmp_path / "run" / "checkpoint" / "step-1")
    lines = train(*superposition(2, 3), *SAVE, "--resilience.allow_config_mismatch")
    assert {step: losses(lines)[step] for step in (2, 3)} == {
        step: staged.losses[step] for step in (2, 3)
    }


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_resume_is_exact_at_every_step(staged, train, tmp_path, step):
    checkpoint = f"step-{step}"
    shutil.copytree(staged.checkpoints / checkpoint, tmp_path / "run" / "checkpoint" / checkpoint)
    resumed = train(*IN_STAGES, *SAVE)
    for key in SAME:
        assert column(resumed, key) == column(staged.lines, key)[step:]
    mine, other = (
        load_full(folder / f"step-{STEPS}")
        for folder in (tmp_path / "run" / "checkpoint", staged.checkpoints)
    )
    assert all(torch.equal(value, other[key]) for key, value in mine.items())


def test_a_change_is_logged_with_the_steps_around_it(train, caplog):
    caplog.set_level("INFO")
    lines = train(*IN_STAGES, "--metrics.log_freq=100")
    assert column(lines, "step") == [1, 2, 3, 4, 5]  # the last and the first of each stage
    text = caplog.text
    assert "Superposition: bags of 4 data tokens in steps 1 to 1 of 6 (mode full); a" in text
    assert "Stage: bags of 2 data tokens in steps 2 to 3 of 6 (mode full); a sequence" in text
    assert "Stage: bags of 3 data tokens in steps 4 to 4 of 6" in text
    assert text.count("Stage: ") == 2
    assert "Boundary: 4 superposition steps done, recovery begins" in text


def test_a_stage_without_steps_is_named(train, caplog):
    caplog.set_level("INFO")
    lines = train("--superposition.bag_size=4,2,3", "--superposition.step_ratio=0.2,0,0.2")
    assert column(lines, "bag_size") == [4, 3, 1, 1, 1, 1]
    assert "Stage 2, bags of 2 data tokens, has no steps" in caplog.text
    assert caplog.text.count("has no steps") == 1


# Checkpoints


def keeping(*args):
    return (*IN_STAGES, *SAVE_LAST, "--checkpoint.keep_latest_k=2", *args)


def test_the_checkpoint_of_each_stage_is_optional_and_kept(train, tmp_path):
    folder = tmp_path / "run" / "checkpoint"
    often = ("--checkpoint.interval=2", "--training.steps=12")
    train(*keeping(*often))
    assert complete_steps(folder) == [4, 8, 10, 12]
    shutil.rmtree(tmp_path / "run")
    train(*keeping(*often, "--superposition.checkpoint_each_stage"))
    assert complete_steps(folder) == [1, 3, 4, 8, 10, 12]
    assert (folder / "boundary").readlink().name == "step-4"
    for step, phase in ((1, "superposition"), (3, "superposition"), (4, "superposition")):
        manifest = manifests.read_manifest(folder / f"step-{step}")
        assert (manifest["phase"], manifest["kept"], manifest["resumable"]) == (phase, True, True)
        assert manifest["boundary"] is (step == 4)
    assert not manifests.read_manifest(folder / "step-10")["kept"]


def test_async_checkpoints_of_stages_are_waited_for(train, tmp_path):
    """The step after a stage begins once its checkpoint is on disk."""
    folder, there = tmp_path / "run" / "checkpoint", {}

    class Trainer(SuperpositionTrainer):
        def train_step(self, data_iterator):
            super().train_step(data_iterator)
            there[self.step] = complete_steps(folder)

    train(
        *keeping("--superposition.checkpoint_each_stage", "--checkpoint.async_mode=async"),
        trainer_class=Trainer,
    )
    assert [there[step] for step in (2, 4, 5)] == [[1], [1, 3], [1, 3, 4]]


def test_manifests_without_the_word_kept(train, tmp_path):
    """Of before November 2026: that of the boundary is kept all the same."""
    folder = tmp_path / "run" / "checkpoint"
    train(*superposition(4, 2), *SAVE, "--training.steps=3")
    for step in (1, 2):
        path = folder / f"step-{step}"
        manifest = manifests.read_manifest(path)
        del manifest["kept"]
        files = manifest.pop("files")
        manifests.write_manifest(path, manifest, files)
    train(*superposition(4, 2), *SAVE, "--checkpoint.keep_latest_k=2")
    assert complete_steps(folder) == [2, 4, 5, 6]


def test_recovery_as_a_job_of_its_own(staged, train):
    """From the boundary of a run in stages, without the section."""
    lines = train(
        *SAVE,
        f"--checkpoint.initial_load_path={staged.checkpoints / 'boundary'}",
        "--checkpoint.no-initial-load-model-only",
    )
    assert losses(lines) == {step: staged.losses[step] for step in (5, 6)}
