"""Checkpoints that are incomplete, damaged or not to be trusted, and folders that fail."""

import os
import pickle
import random
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from datasets import load_dataset
from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from corpora import load_jsonl
from jobs import BOUNDARY, ON, SAVE, STEPS, load_full, losses
from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.resilience.checkpoint import inventory, manifests
from torchtitan.experiments.tst.resilience.checkpoint.inventory import complete_steps
from torchtitan.experiments.tst.resilience.checkpoint.manifests import CheckpointError


def flip(path, byte, bit):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_the_newest_complete_one_and_what_was_skipped(whole, run_folder, train, warnings):
    folder = run_folder(2, 4, 5)
    for name in (".metadata", "manifest.json"):  # as upstream's trainer leaves a save cut short
        (folder / "step-5" / name).unlink()
    (folder / "saving-6").mkdir()
    (folder / "saving-6" / "__0_0.distcp").write_bytes(b"half")
    (folder / "deleting-1").mkdir()
    assert losses(train(*ON, *SAVE)) == {step: whole.losses[step] for step in (5, 6)}
    assert (
        "step-5: it is an incomplete checkpoint: its save or download was cut short" in warnings()
    )
    assert "saving-6: its save was cut short" in warnings()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-2", "step-4", "step-5", "step-6"]


def test_a_job_is_checked_against_the_newest_that_can_be_gone_on_from(run_folder):
    folder = run_folder(1, 4, 5)
    point = inventory.resume_point(inventory.list_checkpoints(folder), STEPS)
    assert point.path == folder / "step-5"
    (folder / "step-5" / "manifest.json").write_text("{")
    point = inventory.resume_point(inventory.list_checkpoints(folder), STEPS)
    assert point.path == folder / "step-4"


def test_a_save_that_lacked_its_name_only(whole, run_folder, train):
    folder = run_folder(2, BOUNDARY)
    (folder / f"step-{BOUNDARY}").rename(folder / f"saving-{BOUNDARY}")
    (folder / "boundary").symlink_to(f"step-{BOUNDARY}")  # is made first
    assert losses(train(*ON, *SAVE)) == {step: whole.losses[step] for step in (4, 5, 6)}
    assert (folder / "boundary").resolve() == folder / f"step-{BOUNDARY}"


def test_a_checkpoint_of_the_model_only(whole, run_folder, train, warnings):
    """The default at the end of a run, which upstream cannot go on from."""
    folder = run_folder(5)
    train(*ON, "--checkpoint.enable", "--checkpoint.interval=100")  # writes step-6
    before = (folder / "step-6" / "manifest.json").read_bytes()
    lines = train(*ON, *SAVE, "--training.steps=8")
    assert losses(lines).keys() == {6, 7, 8}
    assert losses(lines)[6] == whole.losses[6]
    assert "step-6: it is a checkpoint of the model only" in warnings()
    assert (folder / "replaced-6" / "manifest.json").read_bytes() == before
    assert complete_steps(folder) == [5, 6, 7, 8]
    shutil.rmtree(folder)
    train(*ON, "--checkpoint.enable", "--checkpoint.interval=100", "--training.steps=4")
    shutil.rmtree(folder / f"step-{BOUNDARY}")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        train(*ON, *SAVE)


def truncate(checkpoint):
    path = checkpoint / "__0_0.distcp"
    os.truncate(path, path.stat().st_size // 2)
    return "__0_0.distcp"


def flip_data(checkpoint):
    flip(checkpoint / "__0_0.distcp", 20_000, 3)
    return "__0_0.distcp"


def flip_metadata(checkpoint):
    flip(checkpoint / ".metadata", 500, 3)
    return ".metadata"


def flip_manifest(checkpoint):
    flip(checkpoint / "manifest.json", 30, 0)
    return "manifest.json"


def remove(checkpoint):
    (checkpoint / "__0_0.distcp").unlink()
    return "__0_0.distcp"


@pytest.mark.parametrize("damage", [truncate, flip_data, flip_metadata, flip_manifest, remove])
def test_a_damaged_checkpoint(whole, run_folder, train, warnings, damage):
    folder = run_folder(2, 4)
    name = damage(folder / "step-4")
    with pytest.raises(CheckpointError) as error:
        train(*ON, *SAVE)
    assert f"step-4/{name}" in str(error.value)
    assert "--resilience.skip_damaged" in str(error.value)
    lines = train(*ON, *SAVE, "--resilience.skip_damaged")
    assert losses(lines) == {step: whole.losses[step] for step in (3, 4, 5, 6)}
    assert f"step-4/{name}" in warnings()
    assert (folder / "damaged-4").is_dir()
    assert (
        manifests.damages(folder / "step-4", manifests.read_manifest(folder / "step-4")["files"])
        == []
    )


def test_all_damaged(run_folder, train):
    folder = run_folder(2)
    truncate(folder / "step-2")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        train(*ON, *SAVE, "--resilience.skip_damaged")


def test_a_damaged_initial_checkpoint(whole, train, tmp_path):
    folder = shutil.copytree(whole.checkpoints / "step-3", tmp_path / "elsewhere")
    flip_data(folder)
    for what in ("model-only", "no-initial-load-model-only"):
        full = ["--checkpoint.no-initial-load-model-only"] if what != "model-only" else []
        with pytest.raises(CheckpointError, match=r"elsewhere/__0_0\.distcp: its checksum"):
            train(*ON, *SAVE, f"--checkpoint.initial_load_path={folder}", *full)


def test_every_bit_flip_is_noticed_or_harmless(run_folder, tmp_path):
    """200 random ones over all bytes of a checkpoint, and 20 in each of its small files."""
    checkpoint = run_folder(4) / "step-4"
    paths = [path for path in checkpoint.iterdir() if path.is_file()]
    sizes = [path.stat().st_size for path in paths]
    chance = random.Random(0)
    victims = chance.choices(paths, sizes, k=200)
    victims += [path for path in paths if path.name != "__0_0.distcp" for _ in range(20)]
    saved_state = load_full(checkpoint)
    unnoticed = 0
    for path in victims:
        byte, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, byte, bit)
        try:
            manifest = manifests.read_manifest(checkpoint)
            found = manifests.damages(checkpoint, manifest["files"])
        except CheckpointError as error:
            found = [str(error)]
        if found:
            assert path.name in found[0]
        else:  # such as white space in the manifest
            unnoticed += 1
            state = load_full(checkpoint)
            assert all(torch.equal(state[key], saved_state[key]) for key in saved_state)
        flip(path, byte, bit)
    assert unnoticed < 20
    assert manifests.damages(checkpoint, manifests.read_manifest(checkpoint)["files"]) == []


def test_upstreams_checkpoints_are_loaded_unchecked(whole, run_folder, train, warnings):
    folder = run_folder(4)
    (folder / "step-4" / "manifest.json").unlink()
    assert losses(train(*ON, *SAVE)) == {step: whole.losses[step] for step in (5, 6)}
    assert "no manifest.json" in warnings()
    shutil.rmtree(folder)
    checkpoint = run_folder(4) / "step-4"
    (checkpoint / "manifest.json").unlink()
    flip(checkpoint / ".metadata", 2, 3)
    with pytest.raises(CheckpointError, match=r"step-4/\.metadata cannot be read"):
        train(*ON, *SAVE)


def test_nothing_is_changed_in_a_folder_that_is_only_loaded_from(run_folder, train, warnings):
    folder = run_folder(2, 4)
    truncate(folder / "step-4")
    (folder / "saving-6").mkdir()  # of the job that writes there
    train(*ON, *SAVE, "--checkpoint.load_only", "--resilience.skip_damaged")
    assert "step-4/__0_0.distcp" in warnings()
    assert sorted(path.name for path in folder.iterdir()) == ["saving-6", "step-2", "step-4"]


# Nothing in a checkpoint can run code


class Command:
    """Unpickled by DCP or upstream, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", [".metadata", "value", "dataloader", "upstream's dataloader"])
def test_a_checkpoint_cannot_run_code(run_folder, corpus, train, monkeypatch, tmp_path, place):
    load_args = ()
    if place.startswith("upstream"):
        stream = DatasetConfig("on the hub", lambda path: load_jsonl(corpus), lambda s: s["text"])
        monkeypatch.setitem(DATASETS, "jsonl", stream)
        load_args = (
            "--superposition.bag_size=1",
            "--training.dataloader.num_workers=2",
            "--resilience.allow_config_mismatch",
        )
    trap = tmp_path / "trap"
    checkpoint = run_folder(4) / "step-4"
    if place == ".metadata":
        (checkpoint / "manifest.json").unlink()
        metadata = dcp.FileSystemReader(checkpoint).read_metadata()
        metadata = Metadata(metadata.state_dict_metadata, Command(trap), metadata.storage_data)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    else:
        shutil.rmtree(checkpoint)
        from torchtitan.experiments.tst.data.text import streams
        from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

        with monkeypatch.context() as patch:
            if place == "value":
                state = {"step": Command(trap), "ntokens_seen": 0}
                patch.setattr(SuperpositionTrainer, "state_dict", lambda self: state)
            else:
                packed = {"dp_rank_0": pickle.dumps(Command(trap)), "world_size": 1}
                patch.setattr(streams.StreamsDataloader, "state_dict", lambda self: packed)
            train(*ON, *SAVE, "--training.steps=4")
        for step in (1, 2, 3):
            shutil.rmtree(checkpoint.parent / f"step-{step}")
    with pytest.raises(CheckpointError, match=r"mkdir"):
        train(*ON, *SAVE, *load_args)
    assert not trap.exists()


# Where files cannot be written or read


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk(train, tmp_path, monkeypatch, mode):
    from torchtitan.experiments.tst.resilience.checkpoint.writer import _ChecksummingStream

    write, written = _ChecksummingStream.write, []

    def write_until_full(self, data):
        written.append(len(data))
        if sum(written) > 7_000_000:  # in the third checkpoint
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(_ChecksummingStream, "write", write_until_full)
    with pytest.raises(CheckpointError) as error:
        train(*ON, *SAVE, f"--checkpoint.async_mode={mode}")
    assert "No space left on device" in str(error.value)
    folder = tmp_path / "run" / "checkpoint"
    newest = complete_steps(folder)[-1]
    assert f"The newest complete checkpoint is step-{newest}" in str(error.value)
    assert not list(folder.glob("saving-*"))


def test_training_goes_on_after_a_full_disk(whole, train, tmp_path, monkeypatch):
    from torchtitan.experiments.tst.resilience.checkpoint.writer import CheckpointWriter

    with monkeypatch.context() as patch:

        def full(self, metadata, results):
            if self.step == 4:
                raise OSError(28, "No space left on device")
            finish(self, metadata, results)

        finish = CheckpointWriter.finish
        patch.setattr(CheckpointWriter, "finish", full)
        with pytest.raises(CheckpointError, match=f"complete checkpoint is step-{BOUNDARY}"):
            train(*ON, *SAVE)
    assert losses(train(*ON, *SAVE)) == whole.losses


@pytest.mark.parametrize("place", ["/proc/none/run", "a file"])
def test_a_folder_that_cannot_be_written(make_config, tmp_path, place):
    if place == "a file":
        (tmp_path / "file").touch()
        place = str(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"job\.dump_folder = .*: cannot write to"):
        check_job(make_config(f"--job.dump_folder={place}"))


def test_data_that_vanish(train, corpus, monkeypatch, tmp_path):
    from torchtitan.experiments.tst.data.loader import DataError

    lines = (corpus / "train.jsonl").read_text().splitlines(keepends=True)
    paths = [tmp_path / f"{i}.jsonl" for i in range(2)]
    paths[0].write_text("".join(lines[:3]))
    paths[1].write_text("".join(lines[3:]))

    def load(path):
        return load_dataset(
            "json", data_files=[str(p) for p in paths], split="train", streaming=True
        )

    config = DatasetConfig("on the hub", load, lambda sample: sample["text"])
    monkeypatch.setitem(DATASETS, "vanishing", config)
    from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

    class Trainer(SuperpositionTrainer):
        def train_step(self, data_iterator):
            paths[1].unlink(missing_ok=self.step > 1)
            super().train_step(data_iterator)

    with pytest.raises(DataError, match=r"training\.dataset = 'vanishing'"):
        train(*ON, *SAVE, "--training.dataset=vanishing", trainer_class=Trainer)
    assert complete_steps(tmp_path / "run" / "checkpoint")
