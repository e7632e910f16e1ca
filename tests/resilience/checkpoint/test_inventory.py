"""What a folder is, told by its files, and what is said of a path that is no checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from jobs import STEPS, saving
from torchtitan.experiments.tst.resilience.checkpoint import inventory, moves
from torchtitan.experiments.tst.resilience.checkpoint.inventory import (
    Kind,
    find_checkpoint,
    identify,
)
from torchtitan.experiments.tst.resilience.checkpoint.manifests import CheckpointError

MODEL_ONLY = ("--checkpoint.enable", "--checkpoint.interval=4")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run that has ended with full checkpoints of steps 4 and 6."""
    return shutil.copytree(finished(*saving(4)).folder, tmp_path / "run", symlinks=True)


@pytest.fixture
def model(finished, tmp_path):
    """A copy of a checkpoint of the model only."""
    last = finished(*MODEL_ONLY).checkpoints / f"step-{STEPS}"
    return shutil.copytree(last, tmp_path / "model")


def weights(folder, *names, index=None):
    """Weights in Hugging Face format."""
    folder.mkdir()
    for name in names:
        save_file({name.partition(".")[0]: torch.zeros(2)}, folder / name)
    if index is not None:
        content = {"weight_map": {str(n): name for n, name in enumerate(index)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("manifest", [True, False], ids=["ours", "upstream's"])
def test_full_or_of_the_model_only(run, model, manifest):
    full = run / "checkpoint" / "step-4"
    if not manifest:
        (full / "manifest.json").unlink()
        (model / "manifest.json").unlink()
    assert identify(full) is Kind.FULL
    assert identify(model) is Kind.MODEL
    (full / ".metadata").write_bytes(b"\x80")  # a manifest says more of it when it is loaded
    assert identify(full) is (Kind.FULL if manifest else Kind.DAMAGED)


def test_weights_in_hugging_face_format(tmp_path):
    one, two = "model.safetensors", "model-00002-of-00002.safetensors"
    assert identify(weights(tmp_path / "a", one)) is Kind.HUGGING_FACE
    assert identify(weights(tmp_path / "b", one, two, index=[one, two])) is Kind.HUGGING_FACE
    half = weights(tmp_path / "c", one, index=[one, two])
    assert identify(half) is Kind.INCOMPLETE
    assert inventory.describe(half).endswith(f"(missing: {two})")
    of_upstream = weights(tmp_path / "d", one)
    (of_upstream / "sharded").mkdir()  # upstream was about to write an index
    assert identify(of_upstream) is Kind.INCOMPLETE
    (of_upstream / "model.safetensors.index.json").write_text("[1")
    assert identify(of_upstream) is Kind.INCOMPLETE
    assert identify(weights(tmp_path / "e", "model-00001-of-00004.safetensors")) is Kind.INCOMPLETE
    one_of_one = weights(tmp_path / "f", "model-00001-of-00001.safetensors")
    assert identify(one_of_one) is Kind.HUGGING_FACE
    (one_of_one / "manifest.json").write_text('{"name": "of another software"}')
    assert identify(one_of_one) is Kind.HUGGING_FACE


def test_a_pointer_in_the_place_of_weights_is_named(tmp_path):
    folder = weights(tmp_path / "a", "model.safetensors")
    inventory.check_weights(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"a/model\.safetensors is a Git LFS pointer"):
        inventory.check_weights(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"a/model\.safetensors is not a safetensors file"):
        inventory.check_weights(folder)


def test_a_save_that_was_cut_short_and_other_content(run, tmp_path):
    full = run / "checkpoint" / "step-4"
    (full / ".metadata").unlink()
    assert identify(full) is Kind.DAMAGED, "its manifest says that it was complete"
    (full / "manifest.json").unlink()
    assert identify(full) is Kind.INCOMPLETE
    (tmp_path / "empty").mkdir()
    assert identify(tmp_path / "empty") is Kind.INCOMPLETE
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pytorch_model.bin").touch()
    assert identify(tmp_path / "other") is Kind.FOREIGN
    assert identify(tmp_path / "nowhere") is Kind.FOREIGN
    assert identify(run) is Kind.FOREIGN


def test_what_is_said_of_a_path(run, model, tmp_path):
    checkpoints = run / "checkpoint"
    listed = f"({checkpoints / 'step-4'}, {checkpoints / 'step-6'})"
    for path, said in {
        run: f"is a run folder, not one of its checkpoints {listed}",
        checkpoints: f"is a folder of checkpoints, not one of its checkpoints {listed}",
        checkpoints / "step-4": "is a full checkpoint",
        model: "is a checkpoint of the model only",
        run / "config.toml": "is a file, not the folder of a checkpoint",
        tmp_path / "nowhere": "does not exist",
    }.items():
        assert inventory.describe(path) == said
    (checkpoints / "boundary").symlink_to("step-3")
    assert (
        inventory.describe(checkpoints / "boundary") == "is a link to step-3, which does not exist"
    )


def test_the_newest_of_a_run_of_every_kind(run, model, caplog):
    checkpoints = run / "checkpoint"
    assert find_checkpoint(run) == checkpoints / "step-6"
    shutil.copytree(model, checkpoints / "step-10")
    assert find_checkpoint(run) == checkpoints / "step-10"
    weights(checkpoints / "step-12", "model.safetensors")
    assert find_checkpoint(run) == find_checkpoint(checkpoints) == checkpoints / "step-12"
    weights(checkpoints / "step-14", index=["model.safetensors"])
    (checkpoints / "step-14" / "x.distcp").touch()
    (checkpoints / "step-16").mkdir()
    (checkpoints / "step-16" / "somebody's").touch()
    assert find_checkpoint(run) == checkpoints / "step-12"
    assert "step-14: it is an incomplete checkpoint" in caplog.text
    with pytest.raises(CheckpointError, match=r"step-14 is an incomplete checkpoint"):
        find_checkpoint(checkpoints / "step-14")
    (checkpoints / "step-12" / "config.json").touch()
    with pytest.raises(CheckpointError, match="step-12 is exported already"):
        find_checkpoint(checkpoints / "step-12")


def test_what_a_save_replaces_is_kept_unless_it_is_a_full_checkpoint(run, model, caplog):
    folder = run / "checkpoint"

    def save_again(step):
        shutil.copytree(folder / "step-4", folder / f"saving-{step}")
        moves.publish(folder, step, boundary=False)
        assert identify(folder / f"step-{step}") is Kind.FULL

    save_again(6)
    assert not caplog.text
    damaged = (folder / "step-6" / "manifest.json").read_bytes()[:-9]
    (folder / "step-6" / "manifest.json").write_bytes(damaged)
    save_again(6)
    assert identify(folder / "replaced-6") is Kind.DAMAGED
    for name in ("replaced-8", "replaced-8-2"):
        shutil.rmtree(folder / "step-8", ignore_errors=True)
        shutil.copytree(model, folder / "step-8")
        save_again(8)
        assert identify(folder / name) is Kind.MODEL
        assert f"step-8 to {folder / name}, because step 8 is saved again" in caplog.text
    assert [c.step for c in inventory.list_checkpoints(folder)] == [4, 6, 8]
