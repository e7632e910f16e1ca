"""The two phases in one process: what is read, trained, logged, saved and resumed."""

import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from datasets import load_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.protocols.model_converter import (
    _registry_model_converter_cls,
    register_model_converter,
)

from conftest import load_full, tensorboard_scalars
from torchtitan.experiments.tst.checkpoint.files import complete_steps
from torchtitan.experiments.tst.core import BagEmbedding, BagLoss, Phase, fold, head
from torchtitan.experiments.tst.job_config import SuperpositionConfigManager
from torchtitan.experiments.tst.metrics import TRAINING_LOSS, VALIDATION_LOSS
from torchtitan.experiments.tst.tensorboard import LAYOUT
from torchtitan.experiments.tst.trainer import SuperpositionTrainer

S, BOUNDARY, STEPS = 4, 3, 6
B, L = 4, 32  # those of base_args
ON = (f"--superposition.bag_size={S}", f"--superposition.steps={BOUNDARY}")
SAVE = (
    "--checkpoint.enable",
    "--checkpoint.interval=1",
    "--checkpoint.keep_latest_k=0",
    "--checkpoint.no-last-save-model-only",
)


def validation(corpus):
    return (
        "--validation.enable",
        "--validation.dataset=jsonl",
        "--validation.steps=2",
        f"--validation.dataset_path={corpus / 'validation.jsonl'}",
        f"--validation.seq_len={L}",
        "--validation.local_batch_size=4",
    )


def column(lines, key="loss_metrics/global_avg_loss"):
    return [line[key] for line in lines if key in line]


class RecordingTrainer(SuperpositionTrainer):
    """Keeps every micro-batch as it was read: (inputs, labels)."""

    def batch_generator(self, data_iterable):
        self.read = []
        for input_dict, labels in super().batch_generator(data_iterable):
            self.read.append((input_dict["input"], labels))
            yield input_dict, labels


def test_metrics_count_latents_and_data_tokens(train):
    lines = train(*ON, "--metrics.enable_tensorboard")
    assert column(lines, "step") == list(range(1, STEPS + 1))
    assert column(lines, "phase") == ["superposition"] * 3 + ["recovery"] * 3
    assert column(lines, "superposition") == [1] * 3 + [0] * 3
    assert column(lines, "bag_size") == [S] * 3 + [1] * 3
    read = [S * B * L] * 3 + [B * L] * 3
    assert column(lines, "n_tokens_seen") == [sum(read[: i + 1]) for i in range(STEPS)]
    assert column(lines, "n_latents_seen") == [step * B * L for step in range(1, STEPS + 1)]
    assert column(lines, "loss_metrics/superposition") == column(lines)[:3]
    assert column(lines, "loss_metrics/recovery") == column(lines)[3:]
    for line in lines:  # the two are taken at slightly different moments
        ratio = line["data_throughput(tps)"] / line["throughput(tps)"]
        assert ratio == pytest.approx(line["bag_size"], rel=0.5)


def test_boundary_is_logged_and_times_are_of_a_step(train, corpus):
    lines = train(*ON, "--metrics.log_freq=5", *validation(corpus), "--validation.freq=2")
    logged = [line for line in lines if TRAINING_LOSS in line]
    assert column(logged, "step") == [1, 3, 4, 5]
    assert column(lines, "loss_metrics/superposition") == column(logged)[:2]
    # B*L latents a step on one rank: of each line since the last, training or validation
    for line in logged:
        expected = B * L / line["throughput(tps)"]
        assert line["time_metrics/end_to_end(s)"] == pytest.approx(expected, rel=0.5)
    validated = [line for line in lines if VALIDATION_LOSS in line]
    assert column(validated, "step") == [1, 2, 4, 6]
    assert column(validated, "n_latents_seen") == [step * B * L for step in (1, 2, 4, 6)]
    assert column(validated, "n_tokens_seen") == [
        B * L * tokens for tokens in (S, 2 * S, 3 * S + 1, 3 * S + 3)
    ]


def test_metrics_of_a_run_without_superposition(train):
    lines = train()
    assert column(lines, "superposition") == [0] * STEPS
    assert column(lines, "bag_size") == [1] * STEPS
    for line in lines:
        assert line["data_throughput(tps)"] == pytest.approx(line["throughput(tps)"], rel=0.5)
        assert line["n_latents_seen"] == line["n_tokens_seen"]


def test_console_line_shows_phase_and_time_left(train, caplog):
    caplog.set_level("INFO")
    train(*ON)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step:")]
    assert len(lines) == STEPS
    assert "phase: superposition (s=4)" in lines[BOUNDARY - 1]
    assert "phase: recovery (s=1)" in lines[BOUNDARY]
    assert lines[-1].endswith("time left: 0:00:00")


def test_run_folder_explains_itself(train, tmp_path):
    lines = train(*ON, *SAVE, "--metrics.enable_tensorboard")
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {
        "checkpoint",
        "config.toml",
        "metrics.jsonl",
        "tb",
    }
    scalars = tensorboard_scalars(run)
    losses = torch.tensor(column(lines), dtype=torch.float32).tolist()
    assert scalars["loss_metrics/global_avg_loss"] == losses
    assert scalars["bag_size"] == [S] * 3 + [1] * 3
    assert scalars["loss_metrics/superposition"] == losses[:3]
    patterns = [tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags]
    for pattern in patterns:
        if "validation" not in pattern:
            assert any(re.search(pattern, tag) for tag in scalars), pattern
    (folder,) = (run / "tb").iterdir()
    by_tokens = EventAccumulator(str(folder)).Reload()
    points = [p for phase in Phase for p in by_tokens.Scalars(f"by_data_tokens/{phase}")]
    assert [point.step for point in points] == column(lines, "n_tokens_seen")
    assert [point.value for point in points] == losses


def test_weights_and_biases_has_the_same_names(train, monkeypatch, corpus):
    logged = []
    wandb = SimpleNamespace(
        init=lambda **kwargs: None, log=lambda m, step: logged.append(m | {"step": step}), run=None
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    lines = train(*ON, "--metrics.enable_wandb", *validation(corpus), "--validation.freq=3")
    for line in lines:
        del line["phase"]  # text; there it is the number "superposition"
    assert logged == lines


def test_saved_config_starts_the_same_run(train, make_config, tmp_path):
    args = (*ON, "--superposition.weighting=power_law", "--training.steps=6")
    lines = train(*args)
    saved = tmp_path / "saved.toml"
    shutil.copy(tmp_path / "run" / "config.toml", saved)
    config = SuperpositionConfigManager().parse_args([f"--job.config_file={saved}"])
    config.job.config_file = None
    assert config == make_config(*args)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert column(train(f"--job.config_file={saved}")) == column(lines)


@pytest.mark.parametrize(
    "args",
    [
        ("--superposition.mode=input",),
        ("--superposition.mode=output",),
        ("--superposition.scale=batch",),
        ("--superposition.loss=mce_alt",),
        ("--superposition.loss=bce",),
        ("--superposition.loss=hinge",),
        ("--superposition.weighting=power_law",),
        ("--superposition.weighting=exponential",),
        ("--superposition.weighting=first_token",),
        ("--superposition.weighting=fitted",),
    ],
    ids=lambda args: args[0].removeprefix("--superposition."),
)
def test_every_mode_loss_weighting_and_scale_trains(train, args):
    """The first loss is that of the initial model on the first batch, and it falls."""
    initial = {}

    class Trainer(RecordingTrainer):
        def train_step(self, data_iterator):
            if self.step == 1:
                initial.update(self.model_parts[0].state_dict())
                initial.update({k: v.clone() for k, v in initial.items()})
            super().train_step(data_iterator)

        def close(self):
            initial["trainer"] = self
            super().close()

    long = ("--superposition.steps=30", "--training.steps=31", "--optimizer.lr=1e-2")
    lines = train(ON[0], *long, *args, trainer_class=Trainer)
    trainer = initial.pop("trainer")
    losses = column(lines)[:30]
    assert losses[-1] < losses[0]

    section = trainer.job_config.superposition
    shape = trainer.schedule.batch_shape(1, B, L)
    inputs, labels = trainer.read[0]
    assert inputs.shape == (shape.sequences, shape.data_tokens)
    inputs, labels = fold(inputs, labels, S, section.mode)
    assert inputs.shape[:2] == (shape.sequences, shape.latents)
    model = trainer.model_parts[0]
    model.load_state_dict(initial)
    expected = BagLoss(section.loss, section.weighting)(model(inputs), labels)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_flops_are_those_of_the_latents(train, caplog):
    """MFU would be overstated s-fold by data tokens, and with shorter sequences by attention."""
    flops = {}

    class Trainer(SuperpositionTrainer):
        def train_step(self, data_iterator):
            super().train_step(data_iterator)
            flops[scale, self.step] = self.metrics_processor.num_flops_per_token

    for scale in ("sequence", "batch"):
        train(*ON, f"--superposition.scale={scale}", trainer_class=Trainer)
    assert flops["sequence", 1] == flops["sequence", STEPS] == flops["batch", STEPS]
    layers, dim = 2, 64
    saved = 6 * layers * 2 * dim * (L - L // S)  # upstream's count of attention's FLOPs
    assert flops["sequence", 1] - flops["batch", 1] == saved


def test_tied_weights_train_and_reinitialise_together(train):
    lines = train(
        *ON,
        "--model.name=qwen3",
        "--model.flavor=debugmodel",
        "--superposition.reinit_at_recovery=tok_embeddings",
    )
    assert len(lines) == STEPS


def test_recovery_is_ordinary_training(train):
    """Recovery from the first step on is the run without a section, bit for bit."""
    off = train()
    assert column(train("--superposition.bag_size=4", "--superposition.steps=0")) == column(off)
    assert column(train("--superposition.bag_size=1")) == column(off)


def test_gradient_accumulation_is_one_larger_batch(train):
    whole = train(*ON)
    parts = train(*ON, "--training.local_batch_size=2", f"--training.global_batch_size={B}")
    for key in ("loss_metrics/global_avg_loss", "grad_norm"):
        assert column(parts, key)[-STEPS:] == pytest.approx(column(whole, key), rel=1e-5)


@pytest.mark.parametrize(
    "args",
    [
        ("--activation_checkpoint.mode=full",),
        ("--activation_checkpoint.mode=selective",),
        ("--compile.enable", "--compile.backend=aot_eager"),
    ],
    ids=["full AC", "selective AC", "compile"],
)
def test_composes_with_upstreams(train, args):
    plain = train(*ON)
    assert column(train(*ON, *args))[-STEPS:] == pytest.approx(column(plain), rel=1e-5)


@pytest.mark.parametrize(
    ("args", "tolerance"),
    [
        ((), 1e-5),
        (("--model.name=qwen3", "--model.flavor=debugmodel", "--superposition.loss=bce"), 1e-5),
        (("--compile.enable", "--compile.backend=aot_eager"), 1e-5),
        (("--training.mixed_precision_param=bfloat16",), 1e-3),
    ],
    ids=["llama3", "tied weights, bce", "compile", "bfloat16"],
)
def test_chunked_head(train, corpus, monkeypatch, args, tolerance):
    """In training and in validation, from the same weights."""
    args = (*ON, *args, *validation(corpus), "--optimizer.lr=1e-4")
    plain = train(*args)
    labels = []

    def chunked_loss(hidden, weight, y, loss_fn, chunks):
        labels.append(y.ndim)
        return whole(hidden, weight, y, loss_fn, chunks)

    whole = head.chunked_loss
    monkeypatch.setattr(head, "chunked_loss", chunked_loss)
    chunked = train(*args, "--lm_head.chunks=3")
    assert labels.count(3) == BOUNDARY
    assert labels.count(2) > STEPS - BOUNDARY  # validation's too
    for key in (TRAINING_LOSS, VALIDATION_LOSS):
        expected = column(plain, key)
        assert column(chunked, key)[-len(expected) :] == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
def test_compiled_by_inductor(train):
    plain = train(*ON)
    compiled = train(*ON, "--compile.enable")
    assert column(compiled)[-STEPS:] == pytest.approx(column(plain), rel=1e-5)


def test_model_converters_are_left_untouched(train):
    seen = []

    class Converter:
        def __init__(self, job_config, parallel_dims): ...

        def convert(self, model):
            seen.append(type(model.tok_embeddings))

        def post_optimizer_hook(self, model):
            seen.append("step")

    register_model_converter(Converter, "recording")
    try:
        train(*ON, "--model.converters=recording")
    finally:
        del _registry_model_converter_cls["recording"]
    assert seen == [BagEmbedding] + ["step"] * STEPS


@pytest.fixture
def saved_run(train, tmp_path):
    """A run with a checkpoint of every step: its metrics and its folder."""
    lines = train(*ON, *SAVE, trainer_class=RecordingTrainer)
    shutil.move(tmp_path / "run", tmp_path / "saved")
    return lines, tmp_path / "saved" / "checkpoint"


@pytest.mark.parametrize("step", [2, BOUNDARY, 5])
def test_resume_is_exact_on_both_sides_of_the_boundary(saved_run, train, tmp_path, step):
    lines, checkpoints = saved_run
    shutil.copytree(checkpoints / f"step-{step}", tmp_path / "run" / "checkpoint" / f"step-{step}")
    resumed = train(*ON, *SAVE)
    for key in ("step", "phase", "loss_metrics/global_avg_loss", "grad_norm", "n_tokens_seen"):
        assert column(resumed, key) == column(lines, key)[step:]


def test_a_job_may_end_at_the_boundary_and_another_go_on(saved_run, train, tmp_path):
    lines, _ = saved_run
    last = "--checkpoint.interval=100"  # but for the boundary and the end
    first = train(*ON, *SAVE, last, "--superposition.stop_at_boundary")
    again = train(*ON, *SAVE, last, "--superposition.stop_at_boundary")  # as if queued again
    assert column(again, "step") == column(first, "step") == list(range(1, BOUNDARY + 1))
    assert complete_steps(tmp_path / "run" / "checkpoint") == [BOUNDARY]
    assert column(train(*ON, *SAVE, last)) == column(lines)


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("key", ["scale=sequence", "scale=batch", "mode=output"])
def test_tokens_read_are_the_datasets_own_without_gap_or_repeat(
    train, corpus, monkeypatch, key, streaming
):
    def load(path):
        files = str(corpus / "train.jsonl")
        return load_dataset("json", data_files=files, split="train", streaming=streaming)

    config = DatasetConfig("on the hub", load, lambda sample: sample["text"])
    monkeypatch.setitem(DATASETS, "corpus", config)
    trainers = []

    class Trainer(RecordingTrainer):
        def close(self):
            trainers.append(self)
            super().close()

    train(*ON, f"--superposition.{key}", "--training.dataset=corpus", trainer_class=Trainer)
    read = [
        token
        for inputs, labels in trainers[0].read
        for window, last in zip(inputs.tolist(), labels[:, -1].tolist(), strict=True)
        for token in [*window, last]
    ]
    tokenizer = trainers[0].tokenizer
    stream, documents = [], iter(load(""))
    while len(stream) < len(read):
        stream += tokenizer.encode(next(documents)["text"], add_bos=True, add_eos=True)
    assert read == stream[: len(read)]


def test_async_checkpoints(train, tmp_path):
    train(*ON, "--checkpoint.enable", "--checkpoint.interval=1", "--checkpoint.async_mode=async")
    assert (tmp_path / "run" / "checkpoint" / f"step-{BOUNDARY}" / ".metadata").exists()


def test_boundary_checkpoint_is_full_and_never_purged(train, tmp_path):
    train(
        ON[0],
        "--superposition.steps=3",
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


def test_state_dict_is_upstreams_own(saved_run):
    from torchtitan.models.llama3 import Transformer, llama3_args

    with torch.device("meta"):
        expected = {k: v.shape for k, v in Transformer(llama3_args["demo"]).state_dict().items()}
    metadata = dcp.FileSystemReader(str(saved_run[1] / "step-6")).read_metadata()
    saved = {
        key: value.size
        for key, value in metadata.state_dict_metadata.items()
        if key.split(".")[0] not in ("optimizer", "lr_scheduler", "dataloader", "train_state")
    }
    assert saved == expected


def test_validation_is_next_token_loss_on_the_same_data_each_time(train, corpus):
    args = (*validation(corpus), "--validation.freq=1")
    kept = []

    class Trainer(SuperpositionTrainer):
        def close(self):
            kept.append(self)
            super().close()

    # the weights do not move, so neither may the loss, in either phase
    lines = train(*ON, *args, "--optimizer.lr=0", trainer_class=Trainer)
    losses = column(lines, "validation_metrics/loss")
    assert len(losses) == STEPS
    assert len(set(losses)) == 1
    trainer = kept[0]
    loader = trainer.validator.validation_dataloader
    loader.load_state_dict(trainer.validator._start)
    batches = iter(loader)
    expected = []
    for _ in range(2):
        inputs, labels = next(batches)
        assert labels.shape == (4, L)
        logits = trainer.model_parts[0](inputs["input"])
        expected.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
    assert losses[0] == pytest.approx(sum(expected) / 2, rel=1e-5)


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
