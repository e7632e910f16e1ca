"""What a job may be told to load, and what is said of anything else before a device is touched."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torchtitan.protocols import train_spec

from jobs import BOUNDARY, ON, SAVE, STEPS, TST, column, load_full, losses, saving
from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.resilience.checkpoint import inventory
from torchtitan.experiments.tst.resilience.checkpoint.manifests import (
    CheckpointError,
    read_manifest,
    write_manifest,
)
from torchtitan.experiments.tst.results.export import export, read_job

MODEL_ONLY = ("--checkpoint.enable", "--checkpoint.interval=4")
IN_HF = (*MODEL_ONLY, "--checkpoint.last_save_in_hf")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("last_save_in_hf", "no-last_save_model_only"), r"last_save_in_hf = True: needs .*only"),
        (
            ("export_dtype=bfloat16", "no-last_save_model_only"),
            r"export_dtype = 'bfloat16': needs checkpoint\.last_save_model_only = true",
        ),
        (("load_step=-2",), r"load_step = -2: must be a step, or -1"),
        (("initial_load_in_hf_quantized",), r"quantized = True: needs .*initial_load_in_hf"),
        (
            ("initial_load_in_hf", "no-initial_load_model_only"),
            r"initial_load_in_hf = True: needs checkpoint\.initial_load_model_only = true",
        ),
        (
            ("initial_load_in_hf",),
            r"model\.hf_assets_path = '.*tokenizer': holds no checkpoint; .*safetensors weights",
        ),
        (("no-enable", "load_step=3"), r"load_step = 3: needs checkpoint\.enable = true"),
        (("no-enable", "initial_load_path=x"), r"initial_load_path = 'x': needs .*enable = true"),
    ],
)
def test_keys_that_contradict_each_other(make_config, args, message):
    args = [f"--checkpoint.{argument}" for argument in ("enable", *args)]
    with pytest.raises(ConfigError, match=message):
        check_job(make_config(*args))


def test_a_step_that_is_not_there(make_config, run_folder):
    load = "--checkpoint.load_step=77"
    with pytest.raises(
        CheckpointError, match=r"load_step = 77: .*step-77 does not exist\. No step can be"
    ):
        check_job(make_config(*ON, *SAVE, load))
    run_folder(2, 4)
    with pytest.raises(CheckpointError, match=r"step-77 does not exist\. .* loaded: 2, 4\."):
        check_job(make_config(*ON, *SAVE, load))


def test_the_checkpoint_that_is_compared_is_the_one_that_is_loaded(
    run_folder, make_config, train, whole
):
    """The newest is of TorchTitan's own trainer, without a manifest; an older one contradicts."""
    folder = run_folder(2, 4)
    (folder / "step-4" / "manifest.json").unlink()
    content = read_manifest(folder / "step-2")
    content["run"]["model.flavor"] = "another"
    write_manifest(folder / "step-2", content, content.pop("files"))
    assert check_job(make_config(*ON, *SAVE)) == folder / "step-4"
    assert losses(train(*ON, *SAVE)) == {step: whole.losses[step] for step in (5, 6)}
    for step in (4, 5, 6):
        shutil.rmtree(folder / f"step-{step}")
    with pytest.raises(CheckpointError, match=r"model\.flavor = 'demo', .* 'another'"):
        check_job(make_config(*ON, *SAVE))


def test_a_step_that_is_gone_when_it_is_loaded(train, run_folder, monkeypatch):
    from torchtitan.experiments.tst.training import trainer

    monkeypatch.setattr(trainer, "check_job", lambda config: None)
    with pytest.raises(CheckpointError, match=r"load_step = 77: .*step-77 does not exist"):
        train(*ON, *SAVE, "--checkpoint.load_step=77")
    run_folder(2)
    with pytest.raises(CheckpointError, match=r"load_step = 77: .*step-77 does not exist"):
        train(*ON, *SAVE, "--checkpoint.load_step=77")


@pytest.mark.parametrize(("args", "key"), [(MODEL_ONLY, ""), (IN_HF, r".*initial_load_in_hf")])
def test_a_step_with_the_model_only(finished, make_config, tmp_path, args, key):
    checkpoints = finished(*ON, *args).checkpoints
    shutil.copytree(checkpoints, tmp_path / "run" / "checkpoint")
    with pytest.raises(CheckpointError, match=f"loaded: 3, 4.*initial_load_path{key}"):
        check_job(make_config(*ON, *SAVE, f"--checkpoint.load_step={STEPS}"))
    if args == MODEL_ONLY:
        alone = "--checkpoint.exclude_from_loading=optimizer,lr_scheduler,dataloader,train_state"
        check_job(make_config(*ON, *SAVE, f"--checkpoint.load_step={STEPS}", alone))


@pytest.fixture
def folders(finished, tmp_path):
    """Folders that people give as checkpoint.initial_load_path."""
    model, in_hf = finished(*ON, *MODEL_ONLY), finished(*ON, *IN_HF)
    last = model.checkpoints / f"step-{STEPS}"
    exported = tmp_path / "exported"
    export(last, exported, read_job(last, []))
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(model.checkpoints / "step-4", tmp_path / "damaged")
    (damaged / "manifest.json").write_text("{")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").touch()
    return {
        "run": model.folder,
        "checkpoints": model.checkpoints,
        "model": last,
        "in_hf": in_hf.checkpoints / f"step-{STEPS}",
        "exported": exported,
        "full": model.checkpoints / "step-4",
        "file": model.folder / "config.toml",
        "nothing": tmp_path / "nothing",
        "empty": tmp_path / "empty",
        "damaged": damaged,
        "pickles": tmp_path / "pickles",
    }


HF, WHOLE = "--checkpoint.initial_load_in_hf", "--checkpoint.no-initial_load_model_only"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("run", (), "is a run folder, not one of its checkpoints .*step-6"),
        ("checkpoints", (), "is a folder of checkpoints, .*step-6"),
        ("exported", (), "is a model in Hugging Face format: set .*initial_load_in_hf = true"),
        ("in_hf", (WHOLE,), "is a model in Hugging Face format: set .*initial_load_in_hf = true"),
        ("model", (WHOLE,), "is a checkpoint of the model only: set .*model_only = true"),
        ("file", (), "is a file, not the folder of a checkpoint"),
        ("nothing", (), "does not exist"),
        ("empty", (), "is an empty folder"),
        ("damaged", (WHOLE,), "is a damaged checkpoint; give another one"),
        ("pickles", (), r"holds no checkpoint\. It must be a checkpoint"),
        ("pickles", (HF,), r"holds no checkpoint; .* needs a folder with \*\.safetensors weights"),
        ("full", (HF,), "is a full checkpoint; .* but this is TorchTitan's"),
        ("run", (HF,), r"is a run folder, .* needs a folder with \*\.safetensors weights"),
    ],
)
def test_a_path_to_begin_from_of_another_kind(folders, make_config, name, args, message):
    path = f"--checkpoint.initial_load_path={folders[name]}"
    with pytest.raises(ConfigError) as error:
        check_job(make_config(*SAVE, path, *args))
    assert str(error.value).startswith(f"checkpoint.initial_load_path = '{folders[name]}': ")
    error.match(message)
    assert name == "damaged" or "damaged" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "args"),
    [("model", ()), ("in_hf", (HF,)), ("exported", (HF,)), ("full", ()), ("full", (WHOLE,))],
)
def test_a_path_to_begin_from(folders, train, tmp_path, name, args):
    path = f"--checkpoint.initial_load_path={folders[name]}"
    lines = train(*ON, *saving(1), path, *args, "--optimizer.lr=1e-30")
    assert column(lines, "step")[0] == (5 if WHOLE in args else 1)
    first = column(lines, "step")[0]
    ours = load_full(tmp_path / "run" / "checkpoint" / f"step-{first}")
    theirs = load_full(folders["full" if name == "full" else "model"])
    for key in ("output.weight", "layers.0.attention.wq.weight"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("args", [IN_HF, (*MODEL_ONLY, HF)])
def test_a_model_without_a_hugging_face_format(make_config, monkeypatch, args):
    spec = dataclasses.replace(train_spec.get_train_spec("llama3"), state_dict_adapter=None)
    monkeypatch.setitem(train_spec._extra_train_specs, "llama3", spec)
    with pytest.raises(ConfigError, match=r"_in_hf = True: must be false: TorchTitan has no stat"):
        check_job(make_config(*args))


def test_weights_of_another_model(folders, train):
    path = f"--checkpoint.initial_load_path={folders['exported']}"
    with pytest.raises(CheckpointError, match=r"exported as the model of model\.flavor: .*ismatch"):
        train(*SAVE, path, HF, "--model.flavor=demo_small")


def test_a_model_that_has_ended_and_is_damaged(finished, train, tmp_path):
    folder = tmp_path / "run" / "checkpoint"
    shutil.copytree(finished(*ON, *IN_HF).checkpoints, folder)
    (weights,) = (folder / f"step-{STEPS}").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-6/.*safetensors: .* bytes, but"):
        train(*ON, *IN_HF)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"step-6/.*safetensors: No such file"):
        train(*ON, *IN_HF)
    assert losses(train(*ON, *IN_HF, "--resilience.skip_damaged")).keys() == {5, 6}
    assert (folder / f"damaged-{STEPS}").is_dir()


def test_another_job_in_the_folder_of_one_that_has_ended(finished, make_config, tmp_path):
    """It would do nothing, and nobody would know."""
    ended = finished(*IN_HF, "--checkpoint.interval=100").checkpoints
    shutil.copytree(ended, tmp_path / "run" / "checkpoint")
    check_job(make_config(*IN_HF))
    with pytest.raises(CheckpointError, match=r"training\.seq_len = 16, but 32 in the checkpoint"):
        check_job(make_config(*IN_HF, "--training.seq_len=16"))
    with pytest.raises(CheckpointError, match=r"superposition\.bag_size = 4"):
        check_job(make_config(*ON, *IN_HF))


def test_a_run_that_is_to_be_longer_without_a_checkpoint_to_resume_from(
    finished, make_config, tmp_path
):
    ended = finished(*IN_HF, "--checkpoint.interval=100").checkpoints
    shutil.copytree(ended, tmp_path / "run" / "checkpoint")
    with pytest.raises(CheckpointError, match=r"can be resumed:\n.*step-6 is a model in Hugging"):
        check_job(make_config(*IN_HF, "--training.steps=12"))


def test_purging_spares_the_model_of_a_run_that_was_extended(train, tmp_path):
    folder = tmp_path / "run" / "checkpoint"
    args = (*ON, *IN_HF, "--checkpoint.interval=2", "--checkpoint.keep_latest_k=2")
    train(*args, "--training.steps=5")
    train(*args, "--training.steps=12")
    assert inventory.complete_steps(folder) == [BOUNDARY, 5, 8, 10, 12]


def test_a_seed_checkpoint_is_one_that_can_be_loaded(make_config, one_process, train):
    from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

    load = "--checkpoint.load_step=0"
    trainer = SuperpositionTrainer(make_config(*IN_HF, load, "--checkpoint.create_seed_checkpoint"))
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()
    torch.distributed.destroy_process_group()
    assert column(train(*IN_HF, load), "step")[0] == 1


def test_an_index_of_another_model_does_not_lose_the_last_save(corpus, train, tmp_path):
    """Upstream names the files by the index beside the tokenizer, and fails on other names."""
    assets = shutil.copytree(corpus / "tokenizer", tmp_path / "assets")
    index = '{"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}'
    (assets / "model.safetensors.index.json").write_text(index)
    train(*IN_HF, f"--model.hf_assets_path={assets}")
    last = tmp_path / "run" / "checkpoint" / f"step-{STEPS}"
    assert inventory.identify(last) is inventory.Kind.HUGGING_FACE
    assert sorted(path.name for path in last.iterdir()) == [
        "manifest.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]


def test_the_index_of_the_model_names_the_files_of_several_ranks(
    finished, corpus, launch, tmp_path
):
    """Each rank of a pipeline has a part of the names."""
    (whole,) = (finished(*IN_HF).checkpoints / f"step-{STEPS}").glob("*.safetensors")
    names = sorted(load_file(whole))
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {name: files[n % 2] for n, name in enumerate(names)}}
    assets = shutil.copytree(corpus / "tokenizer", tmp_path / "assets")
    (assets / "model.safetensors.index.json").write_text(json.dumps(index))
    launch(
        TST,
        *IN_HF,
        f"--model.hf_assets_path={assets}",
        f"--job.dump_folder={tmp_path / 'run'}",
        "--parallelism.pipeline_parallel_degree=2",
        processes=2,
    )
    last = tmp_path / "run" / "checkpoint" / f"step-{STEPS}"
    assert inventory.identify(last) is inventory.Kind.HUGGING_FACE
    assert sorted(path.name for path in last.glob("*.safetensors")) == files
    saved, expected = {}, load_file(whole)
    for path in last.glob("*.safetensors"):
        saved |= load_file(path)
    assert saved.keys() == expected.keys()
    assert all(saved[name].shape == expected[name].shape for name in names)
