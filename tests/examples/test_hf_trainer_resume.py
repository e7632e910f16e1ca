"""The example for the Hugging Face Trainer: resume, saved models, the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
from conformance_of_hf_trainer import LLAMA, QWEN3, SMALL, S, V, arguments, example, new_model
from conformance_of_hf_trainer import L as LATENTS
from hf_trainer_runs import BOUNDARY, STEPS, losses, run, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from torchtitan.experiments.tst.core import Schedule


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of five steps with a checkpoint of each, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    trainer, _ = run(folder, new_model(QWEN3), tokens(), **options)
    return trainer, folder


@pytest.mark.parametrize("checkpoint", ["checkpoint-1", "boundary-2", "checkpoint-3"])
def test_resumes_exactly(whole, tmp_path, checkpoint):
    trainer, folder = whole
    model = new_model(QWEN3)
    nn.init.zeros_(model.model.norm.weight)  # what it has is not kept
    resume = str(folder / checkpoint)
    resumed, _ = run(tmp_path, model, tokens(), gradient_accumulation_steps=2, resume=resume)
    assert losses(resumed) == losses(trainer)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_resume_reads_no_data_that_it_skips(whole, tmp_path, monkeypatch):
    read = []
    get = example.Windows.__getitem__
    monkeypatch.setattr(
        example.Windows, "__getitem__", lambda self, n: read.append(n) or get(self, n)
    )
    resume = str(whole[1] / "checkpoint-3")
    run(tmp_path, new_model(QWEN3), tokens(), gradient_accumulation_steps=2, resume=resume)
    assert read == list(range(3 * 4, 5 * 4))


def test_windows_follow_each_other(whole):
    windows = whole[0].train_dataset
    assert len(windows) == STEPS * 4
    read = torch.cat([windows[n] for n in range(len(windows))])
    assert read.tolist() == tokens()[: len(read)].tolist()
    sizes = [len(windows[n]) for n in range(len(windows))]
    assert sizes == [S * LATENTS + 1] * 4 * BOUNDARY + [LATENTS + 1] * 4 * (STEPS - BOUNDARY)


def test_boundary_is_kept_when_checkpoints_are_deleted(tmp_path):
    options = {"save_strategy": "steps", "save_steps": STEPS, "save_total_limit": 1}
    run(tmp_path, new_model(LLAMA), tokens(), **options)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == [f"boundary-{BOUNDARY}", f"checkpoint-{STEPS}"]


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3-tied"])
def test_saved_model_is_ordinary(tmp_path, config):
    trainer, _ = run(tmp_path / "run", new_model(config), tokens())
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(loaded) is type(trainer.model)
    assert type(loaded.get_input_embeddings()) is nn.Embedding
    ids = torch.randint(V, (2, LATENTS))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    for model in (loaded, trainer.model):
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        assert tied == config.tie_word_embeddings


def test_embedding_that_does_more_is_refused():
    model = new_model(LLAMA)
    model.set_input_embeddings(Gemma3TextScaledWordEmbedding(V, 32, 0, embed_scale=2.0))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Embedding"):
        example.accept_bags(model)


# The command line


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the example from the command line, in this process."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    np.save(tmp_path / "train.npy", tokens(2000))
    np.save(tmp_path / "eval.npy", tokens(100))

    def call(*more: str) -> list[dict]:
        files = {"model_config": "", "train_tokens": "train.npy", "eval_tokens": "eval.npy"}
        named = {key: str(tmp_path / name) for key, name in files.items()} | {
            "output_dir": str(tmp_path / "out"),
            "seq_len": LATENTS,
            "bag_size": S,
            "step_ratio": 0.5,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
            "logging_steps": 1,
            "warmup_steps": 1,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": json.dumps({"num_decay_steps": 1}),
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": "none",
        }
        line = [part for key, value in named.items() for part in (f"--{key}", str(value))]
        monkeypatch.setattr("sys.argv", ["hf_trainer.py", *line, *more])
        example.main()
        state = tmp_path / "out" / "checkpoint-4" / "trainer_state.json"
        return json.loads(state.read_text())["log_history"]

    return call


def test_command_line_trains_and_resumes(command, tmp_path):
    whole = command()
    assert sorted(path.name for path in (tmp_path / "out").glob("*-*")) == [
        "boundary-2",
        *(f"checkpoint-{step}" for step in (1, 2, 3, 4)),
    ]
    assert len([entry for entry in whole if "eval_loss" in entry]) == 4
    model = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.move(tmp_path / "out" / "boundary-2", tmp_path / "boundary")
    resumed = command("--resume_from_checkpoint", str(tmp_path / "boundary"))
    keys = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")
    values = [[{key: entry.get(key) for key in keys} for entry in log] for log in (whole, resumed)]
    assert values[0] == values[1]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model
    assert command()[0] == whole[0]  # the first weights are those of the seed


def test_too_few_tokens_are_refused(command):
    with pytest.raises(ValueError, match="the run reads 4,920 tokens; the data has 2,000"):
        command("--max_steps", "60")


def test_number_of_steps_must_be_given(command):
    with pytest.raises(ValueError, match="give --max_steps"):
        command("--max_steps", "-1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("auto_find_batch_size", True),
        ("save_only_model", True),
        ("ignore_data_skip", True),
    ],
)
def test_arguments_that_do_not_work_are_refused(command, name, value):
    with pytest.raises(ValueError, match=f"^{name} does not work with TST: "):
        command(f"--{name}", str(value))


@pytest.mark.parametrize(
    ("windows", "found"),
    [({"steps": 3}, "steps = 3 and per_step = 4"), ({"per_step": 2}, "steps = 4 and per_step = 2")],
)
def test_windows_of_another_run_are_refused(tmp_path, windows, found):
    """The Trainer would begin with superposition again in the second epoch."""
    args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2)
    given = {"tokens": tokens(), "seq_len": 16, "schedule": Schedule(), "steps": 4, "per_step": 4}
    trainer = example.TSTTrainer(
        example.accept_bags(new_model(LLAMA)),
        args,
        example.Collator(16),
        example.Windows(**given | windows),
    )
    with pytest.raises(ValueError, match=f"{found}; by .* max_steps = 4 and 4"):
        trainer.train()
