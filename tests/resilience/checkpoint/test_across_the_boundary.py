"""The boundary checkpoint, and jobs that go on from it or end there."""

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from jobs import BOUNDARY, ON, SAVE, SAVE_LAST, column, load_full, losses
from torchtitan.experiments.tst.resilience.checkpoint import manifests
from torchtitan.experiments.tst.resilience.checkpoint.inventory import complete_steps


def test_boundary_checkpoint_has_a_name_and_is_full(whole):
    link = whole.checkpoints / "boundary"
    assert str(link.readlink()) == f"step-{BOUNDARY}"
    manifest = manifests.read_manifest(link)
    assert manifest["phase"] == "superposition"
    assert manifest["data_tokens"] == BOUNDARY * 4 * 4 * 32
    assert manifest["run"]["superposition.bag_size"] == 4
    keys = {key.split(".")[0] for key in load_full(link)}
    assert keys >= {"optimizer", "tok_embeddings"}
    keys = {key.split(".")[0] for key in dcp.FileSystemReader(link).read_metadata().planner_data}
    assert keys >= {"lr_scheduler", "dataloader", "train_state"}


@pytest.mark.parametrize("section", [ON, ()], ids=["section kept", "section removed"])
@pytest.mark.parametrize("killed_in_first_save", [False, True])
def test_recovery_as_a_job_of_its_own(whole, train, tmp_path, section, killed_in_first_save):
    if killed_in_first_save:  # upstream would start at step 1, from random weights
        (tmp_path / "run" / "checkpoint" / "saving-4").mkdir(parents=True)
    lines = train(
        *section,
        *SAVE,
        f"--checkpoint.initial_load_path={whole.checkpoints / 'boundary'}",
        "--checkpoint.no-initial-load-model-only",
    )
    assert losses(lines) == {step: whole.losses[step] for step in (4, 5, 6)}


def test_section_removed_in_the_run_folder(whole, run_folder, train):
    """Also then, the boundary checkpoint is not purged."""
    folder = run_folder(BOUNDARY)
    lines = train(*SAVE, "--checkpoint.keep_latest_k=2")
    assert losses(lines) == {step: whole.losses[step] for step in (4, 5, 6)}
    assert complete_steps(folder) == [BOUNDARY, 4, 5, 6]


def test_only_the_model_of_a_boundary_checkpoint(whole, train, warnings):
    train(
        *SAVE,
        "--training.steps=1",
        f"--checkpoint.initial_load_path={whole.checkpoints / 'boundary'}",
    )
    assert "initial_load_model_only = false" in warnings()


@pytest.mark.parametrize("step", [2, BOUNDARY, 5])
def test_resume_is_exact_on_both_sides_of_the_boundary(whole, run_folder, train, step):
    run_folder(step)
    resumed = train(*ON, *SAVE)
    for key in ("step", "phase", "loss_metrics/global_avg_loss", "grad_norm", "n_tokens_seen"):
        assert column(resumed, key) == column(whole.lines, key)[step:]


def test_a_job_may_end_at_the_boundary_and_another_go_on(whole, train, tmp_path):
    first = train(*ON, *SAVE_LAST, "--superposition.stop_at_boundary")
    again = train(*ON, *SAVE_LAST, "--superposition.stop_at_boundary")  # as if queued again
    assert column(again, "step") == column(first, "step") == list(range(1, BOUNDARY + 1))
    assert complete_steps(tmp_path / "run" / "checkpoint") == [BOUNDARY]
    assert column(train(*ON, *SAVE_LAST)) == column(whole.lines)


def test_async_checkpoints(train, tmp_path):
    train(*ON, *SAVE, "--checkpoint.async_mode=async")
    assert (tmp_path / "run" / "checkpoint" / f"step-{BOUNDARY}" / ".metadata").exists()


def test_boundary_checkpoint_is_full_and_never_purged(train, tmp_path):
    train(
        *ON,
        "--training.steps=12",
        "--checkpoint.enable",
        "--checkpoint.interval=2",
        "--checkpoint.keep_latest_k=2",
    )
    folder = tmp_path / "run" / "checkpoint"
    assert (folder / "boundary").resolve() == folder / "step-3"
    steps = complete_steps(folder)
    assert steps == [3, 8, 10, 12]
    keys = dcp.FileSystemReader(str(folder / "step-3")).read_metadata().state_dict_metadata
    prefixes = {key.split(".")[0] for key in keys}
    assert prefixes >= {"optimizer", "lr_scheduler", "dataloader", "train_state", "tok_embeddings"}


def test_state_dict_is_upstreams_own(whole):
    from torchtitan.models.llama3 import Transformer, llama3_args

    with torch.device("meta"):
        expected = {k: v.shape for k, v in Transformer(llama3_args["demo"]).state_dict().items()}
    metadata = dcp.FileSystemReader(str(whole.checkpoints / "step-6")).read_metadata()
    saved = {
        key: value.size
        for key, value in metadata.state_dict_metadata.items()
        if key.split(".")[0] not in ("optimizer", "lr_scheduler", "dataloader", "train_state")
    }
    assert saved == expected


def test_reinit_at_recovery(train, tmp_path):
    args = (
        *SAVE,
        "--superposition.reinit_at_recovery=tok_embeddings,output",
        "--optimizer.lr=1e-30",
    )
    train(*ON, *args)
    first, second = (load_full(tmp_path / "run" / "checkpoint" / f"step-{n}") for n in (3, 4))
    names = [key for key in first if not key.startswith("optimizer")]
    changed = {name for name in names if (first[name] - second[name]).abs().max() > 1e-6}
    assert changed == {"tok_embeddings.weight", "output.weight"}
    # as at the start of a run: the embedding standard normal, the head 1/sqrt(d)
    assert second["tok_embeddings.weight"].std().item() == pytest.approx(1, rel=0.05)
    assert second["output.weight"].std().item() == pytest.approx(64**-0.5, rel=0.05)
    steps = {key: value.item() for key, value in second.items() if key.endswith(".step")}
    for key, value in steps.items():
        assert value == (1 if ".output." in key or "tok_embeddings" in key else 4)

    # the same new weights in a run resumed at the boundary
    shutil.move(tmp_path / "run", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/checkpoint/step-3", tmp_path / "run/checkpoint/step-3")
    train(*ON, *args)
    resumed = load_full(tmp_path / "run" / "checkpoint" / "step-4")
    assert torch.equal(resumed["tok_embeddings.weight"], second["tok_embeddings.weight"])
