"""The writer on its own: what it writes is DCP's, and its manifest is of those bytes."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from torchtitan.experiments.tst.resilience.checkpoint import manifests
from torchtitan.experiments.tst.resilience.checkpoint.writer import CheckpointWriter

MANIFEST = {"step": 7, "boundary": True, "resumable": True}
STATE = {"weights": torch.arange(10_000.0), "step": 7, "bytes": b"\0\1"}


@pytest.mark.parametrize("how", ["save", "async thread", "async process"])
def test_what_is_written(tmp_path, one_process, monkeypatch, how):
    # else DCP's process listens at a port that was free seconds before
    monkeypatch.setenv("DCP_USE_PREFIX_STORE", "1")
    writer = CheckpointWriter(tmp_path, 7, MANIFEST)
    if how == "save":
        dcp.save(STATE, storage_writer=writer)
    else:
        dist.init_process_group("gloo")
        kind = AsyncCheckpointerType[how.removeprefix("async ").upper()]
        future = dcp.async_save(STATE, storage_writer=writer, async_checkpointer_type=kind)
        future.result(timeout=120)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boundary", "step-7"]
    checkpoint = tmp_path / "boundary"
    manifest = manifests.read_manifest(checkpoint)
    assert manifest["step"] == 7
    assert manifest["files"].keys() == {".metadata", "__0_0.distcp"}
    assert manifests.damages(checkpoint, manifest["files"]) == []
    loaded = {"weights": torch.zeros(10_000), "step": 0, "bytes": b""}
    dcp.load(loaded, checkpoint_id=checkpoint)
    assert loaded["weights"].equal(STATE["weights"])
    assert (loaded["step"], loaded["bytes"]) == (7, b"\0\1")


def test_saving_a_step_again_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        state = {"weights": torch.full((5,), value)}
        dcp.save(state, storage_writer=CheckpointWriter(tmp_path, 7, MANIFEST))
        left = tmp_path / "saving-7"
        left.mkdir()  # as a later save that was cut short leaves it, of more ranks
        (left / "__5_0.distcp").touch()
    loaded = {"weights": torch.zeros(5)}
    dcp.load(loaded, checkpoint_id=tmp_path / "step-7")
    assert loaded["weights"].tolist() == [2.0] * 5
    assert not (tmp_path / "step-7" / "__5_0.distcp").exists()


def test_a_file_is_synced_with_all_of_its_bytes(tmp_path):
    from torchtitan.experiments.tst.resilience.checkpoint.writer import _ChecksummingFileSystem

    path = tmp_path / "file"
    with _ChecksummingFileSystem().create_stream(path, "wb") as stream:
        stream.write(b"a few bytes")
        stream.fileno()  # as DCP calls it for fsync, before it closes the file
        assert path.read_bytes() == b"a few bytes"
