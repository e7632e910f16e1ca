"""The two phases in one process: what is read and trained."""

import shutil

import pytest
import torch.nn.functional as F
from datasets import load_dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.protocols.model_converter import (
    _registry_model_converter_cls,
    register_model_converter,
)

from jobs import BOUNDARY, ON, STEPS, B, L, RecordingTrainer, S, column, superposition, validation
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.core import BagEmbedding, BagLoss, fold, head
from torchtitan.experiments.tst.metrics_file import TRAINING_LOSS, VALIDATION_LOSS
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer


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


def test_tied_weights_train_and_reinitialise_together(train):
    lines = train(
        *ON,
        "--model.name=qwen3",
        "--model.flavor=tiny_tied",
        "--superposition.reinit_at_recovery=tok_embeddings",
    )
    assert len(lines) == STEPS


def test_recovery_is_ordinary_training(finished, train):
    """Recovery from the first step on is the run without a section, bit for bit."""
    off = finished().lines
    assert column(train(*superposition(4, steps=0))) == column(off)
    assert column(train("--superposition.bag_size=1")) == column(off)


def test_no_graph_of_a_micro_batch_is_left_when_the_optimizer_steps(train):
    graphs = []

    class Trainer(SuperpositionTrainer):
        def before_optimizer_step(self, *args):
            graphs.append([loss.grad_fn for loss in self._losses])
            super().before_optimizer_step(*args)

    train(*ON, f"--training.global_batch_size={2 * B}", trainer_class=Trainer)
    assert graphs == [[None, None]] * STEPS


def test_gradient_accumulation_is_one_larger_batch(whole, train):
    parts = train(*ON, "--training.local_batch_size=2", f"--training.global_batch_size={B}")
    for key in ("loss_metrics/global_avg_loss", "grad_norm"):
        assert column(parts, key) == pytest.approx(column(whole.lines, key), rel=1e-5)


@pytest.mark.parametrize(
    "args",
    [
        ("--activation_checkpoint.mode=full",),
        ("--activation_checkpoint.mode=selective",),
        ("--compile.enable", "--compile.backend=aot_eager"),
    ],
    ids=["full AC", "selective AC", "compile"],
)
def test_composes_with_upstreams(whole, train, args):
    assert column(train(*ON, *args)) == pytest.approx(column(whole.lines), rel=1e-5)


@pytest.mark.parametrize(
    ("args", "tolerance"),
    [
        ((), 1e-5),
        (("--model.name=qwen3", "--model.flavor=tiny_tied", "--superposition.loss=bce"), 1e-5),
        (("--compile.enable", "--compile.backend=aot_eager"), 1e-5),
        (("--training.mixed_precision_param=bfloat16",), 1e-3),
    ],
    ids=["llama3", "tied weights, bce", "compile", "bfloat16"],
)
def test_chunked_head(finished, train, corpus, monkeypatch, args, tolerance):
    """In training and in validation, from the same weights."""
    args = (*ON, *args, *validation(corpus), "--optimizer.lr=1e-4")
    plain = finished(*args).lines
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
        assert column(chunked, key) == pytest.approx(column(plain, key), rel=tolerance)


@pytest.mark.slow
def test_compiled_by_inductor(whole, train):
    compiled = train(*ON, "--compile.enable")
    assert column(compiled) == pytest.approx(column(whole.lines), rel=1e-5)


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
