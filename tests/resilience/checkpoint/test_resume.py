"""Which checkpoint a job resumes from, and which configs contradict it."""

import json
import shutil

import pytest
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from corpora import load_jsonl
from jobs import BOUNDARY, ON, SAVE, losses, superposition
from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.resilience.checkpoint import inventory
from torchtitan.experiments.tst.resilience.checkpoint.manifests import CheckpointError

# Nothing in a checkpoint can run code


@pytest.mark.parametrize(
    ("step", "args", "message"),
    [
        (2, ("--superposition.bag_size=8",), "superposition.bag_size = 8, but 4 in the checkpoint"),
        (5, ("--superposition.bag_size=8",), "superposition.bag_size = 8, but 4 in the checkpoint"),
        (2, ("--superposition.steps=5",), "superposition.steps = 5, but 3 in the checkpoint"),
        (
            5,
            ("--superposition.steps=None", "--superposition.step_ratio=0.7"),
            "superposition.steps = 4, but 3 in the checkpoint",
        ),
        (2, ("--superposition.mode=input",), "'input', but 'full' in the checkpoint"),
        (2, ("--superposition.scale=batch",), "'batch', but 'sequence' in the checkpoint"),
        (2, ("--superposition.loss=bce",), "'bce', but 'mce' in the checkpoint"),
        (2, ("--superposition.bag_size=1",), "superposition.bag_size = 1, but 4 in the checkpoint"),
        (5, ("--training.seq_len=16",), "training.seq_len = 16, but 32 in the checkpoint"),
        (
            5,
            ("--training.local_batch_size=8",),
            "training.global_batch_size = 8, but 4 in the checkpoint",
        ),
        (5, ("--model.flavor=debugmodel",), "model.flavor = 'debugmodel', but 'demo' in"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint(run_folder, make_config, step, args, message):
    run_folder(step)
    with pytest.raises(CheckpointError) as error:
        check_job(make_config(*ON, *SAVE, *args))
    assert message in str(error.value)
    assert f"step-{step}" in str(error.value)
    check_job(make_config(*ON, *SAVE, *args, "--resilience.allow_config_mismatch"))


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (superposition("4,2", "1,2"), ["bag_size = [4, 2], but [4, 2, 3] in the checkpoint"]),
        (
            superposition("4,3,2", "1,2,1"),
            ["bag_size = [4, 3, 2], but [4, 2, 3] in the checkpoint"],
        ),
        (superposition("4,2,3", "2,1,1"), ["steps = [2, 1, 1], but [1, 2, 1] in the checkpoint"]),
        (
            superposition("4", "1"),
            ["bag_size = 4, but", "steps = 1, but [1, 2, 1] in the checkpoint"],
        ),
        (superposition("4,2,2,3", "1,1,1,1"), []),  # the same schedule
        ((), ["bag_size = 1, but [4, 2, 3] in the checkpoint"]),
    ],
    ids=["fewer", "others", "other steps", "one", "the same", "none"],
)
def test_stages_that_contradict_the_checkpoint(staged_folder, make_config, args, found):
    staged_folder(2)
    if not found:
        check_job(make_config(*args, *SAVE))
        return
    with pytest.raises(CheckpointError) as error:
        check_job(make_config(*args, *SAVE))
    assert all(f"superposition.{text}" in str(error.value) for text in found)


def test_after_the_boundary_the_section_may_be_gone(staged_folder, make_config):
    folder = staged_folder(3)
    with pytest.raises(CheckpointError, match="bag_size = 1, but "):
        check_job(make_config(*SAVE))
    shutil.rmtree(folder)
    staged_folder(4)
    check_job(make_config(*SAVE))


def test_a_section_added_to_a_run_without(train, make_config):
    train(*SAVE, "--training.steps=1")
    with pytest.raises(CheckpointError, match=r"bag_size = 4, but 1 in the checkpoint"):
        check_job(make_config(*ON, *SAVE))


def test_another_tokenizer(run_folder, corpus, make_config, tmp_path):
    run_folder(2)
    other = shutil.copytree(corpus / "tokenizer", tmp_path / "elsewhere")
    same = f"--model.hf_assets_path={other}"
    check_job(make_config(*ON, *SAVE, same))  # the same one in another folder
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        CheckpointError, match=r"model\.hf_assets_path = 'a tokenizer with checksum"
    ):
        check_job(make_config(*ON, *SAVE, same))


def test_another_dataset_unless_its_position_is_left_out(run_folder, make_config, monkeypatch):
    monkeypatch.setitem(DATASETS, "jsonl2", DATASETS["jsonl"])
    run_folder(2)
    other = (*ON, *SAVE, "--training.dataset=jsonl2")
    with pytest.raises(CheckpointError, match=r"training\.dataset = 'jsonl2'"):
        check_job(make_config(*other))
    check_job(make_config(*other, "--checkpoint.exclude_from_loading=dataloader"))


def test_a_contradiction_is_also_found_when_loading(run_folder, train, monkeypatch):
    """As the checks before the start cannot tell which checkpoint will be the one."""
    from torchtitan.experiments.tst.training import trainer

    run_folder(2)
    monkeypatch.setattr(trainer, "check_job", lambda config: None)
    with pytest.raises(CheckpointError, match=r"superposition\.mode = 'input'"):
        train(*ON, *SAVE, "--superposition.mode=input")


def test_the_flag_goes_on_with_the_configs_values(run_folder, train, warnings):
    run_folder(5)
    lines = train(*ON, *SAVE, "--superposition.bag_size=8", "--resilience.allow_config_mismatch")
    assert losses(lines).keys() == {6}
    assert "superposition.bag_size = 8, but 4 in the checkpoint" in warnings()


def test_going_back_purges_nothing_of_its_own(run_folder, train):
    folder = run_folder(2, 4, 5)
    train(*ON, *SAVE, "--checkpoint.load_step=2", "--checkpoint.keep_latest_k=2")
    assert inventory.complete_steps(folder) == [BOUNDARY, 4, 5, 6]


def test_newer_checkpoints_than_the_one_asked_for(whole, run_folder, train, warnings):
    run_folder(2, 5)
    lines = train(*ON, *SAVE, "--checkpoint.load_step=2", "--training.steps=6")
    assert losses(lines) == {step: whole.losses[step] for step in (3, 4, 5, 6)}
    assert "there are newer checkpoints ([5])" in warnings()


def test_a_loader_that_cannot_share_its_position_out_anew(train, corpus, monkeypatch):
    from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

    stream = DatasetConfig("on the hub", lambda path: load_jsonl(corpus), lambda s: s["text"])
    monkeypatch.setitem(DATASETS, "streaming", stream)
    args = (*SAVE, "--training.dataset=streaming", "--training.dataloader.num_workers=2")
    train(*args, "--training.steps=2")

    class OnTwoRanks(SuperpositionTrainer):
        def __init__(self, job_config):
            super().__init__(job_config)
            self.dp_degree = 2

    with pytest.raises(CheckpointError, match="of 1 data-parallel ranks, but this launch has 2"):
        train(*args, trainer_class=OnTwoRanks)
    train(*args)
    no_workers = (*args, "--checkpoint.load_step=2", "--training.dataloader.num_workers=0")
    with pytest.raises(CheckpointError, match="num_workers = 'at most 1', but 2 in the checkpoint"):
        train(*no_workers)
    with pytest.raises(CheckpointError, match="without worker processes"):
        train(*no_workers, "--resilience.allow_config_mismatch")
