"""The example of a model of one's own: its numbers, its boundary, its ranks, its limits."""

import copy
import dataclasses
import math
import shutil

import conformance_of_own_model
import conformance_of_trainer
import pytest
import torch
import torch.nn.functional as F
import torchtitan.protocols.train_spec as train_spec_module
from loading import EXAMPLES, load_example
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.protocols.train_spec import get_train_spec

from corpora import write_shards
from jobs import (
    BOUNDARY,
    ON,
    ROOT,
    SAVE,
    STEPS,
    B,
    L,
    RecordingTrainer,
    S,
    column,
    load_full,
    validation,
)
from torchtitan.experiments.tst.core import BagEmbedding, BagLoss, fold
from torchtitan.experiments.tst.core.conformance import check
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.metrics_file import TRAINING_LOSS, VALIDATION_LOSS
from torchtitan.experiments.tst.start import check as check_start
from torchtitan.experiments.tst.testing import ranks
from torchtitan.experiments.tst.testing.layouts import MODELS, Layout
from torchtitan.experiments.tst.testing.runs import Runs

example = load_example("own_model")
OWN = (
    "--model.name=own_model",
    "--model.flavor=small",
    "--experimental.custom_import=docs.examples.own_model",
)
TOML = str((EXAMPLES / "own_model.toml").relative_to(ROOT))


@pytest.fixture
def demo(monkeypatch, corpus, tmp_path):
    """Arguments by which the example's TOML reads the small corpus, and writes to a new folder."""
    monkeypatch.syspath_prepend(ROOT)
    return (
        f"--job.dump_folder={tmp_path / 'run'}",
        f"--model.hf_assets_path={corpus / 'tokenizer'}",
        f"--training.dataset_path={corpus / 'train.jsonl'}",
        f"--validation.dataset_path={corpus / 'validation.jsonl'}",
    )


class Step:
    """What the trainer knew and did in a step."""

    def __init__(self, trainer):
        self.trainer, self.first = trainer, len(getattr(trainer, "read", []))
        self.weights = copy.deepcopy(trainer.model_parts[0].state_dict())

    def end(self):
        self.loss = torch.stack(self.trainer._losses).sum().item()
        batches = self.trainer.read[self.first :]
        self.inputs, self.labels = map(torch.cat, zip(*batches, strict=True))

    def keep_gradients(self):
        model = self.trainer.model_parts[0]
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_and_gradients_are_those_of_plain_torch(train):
    """Of a step in superposition and of one in recovery, each of two micro-batches."""
    steps = []

    class Trainer(RecordingTrainer):
        def train_step(self, data_iterator):
            steps.append(Step(self))
            super().train_step(data_iterator)
            steps[-1].end()

        def before_clipping(self, parameters):
            super().before_clipping(parameters)
            steps[-1].keep_gradients()

    train(*ON, *OWN, f"--training.global_batch_size={2 * B}", trainer_class=Trainer)
    for step, bag_size in ((steps[BOUNDARY - 1], S), (steps[BOUNDARY], 1)):
        assert step.inputs.shape == (2 * B, bag_size * L)
        model = example.OwnModel(example.OwnModelArgs())
        model.load_state_dict(step.weights)
        if bag_size > 1:
            model.tok_embeddings = BagEmbedding.from_embedding(model.tok_embeddings)
            inputs, labels = fold(step.inputs, step.labels, bag_size)
            loss = BagLoss("mce")(model(inputs), labels)
        else:
            loss = F.cross_entropy(model(step.inputs).flatten(0, 1), step.labels.flatten())
        loss.backward()
        assert step.loss == pytest.approx(loss.item(), rel=1e-6)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close(step.gradients, gradients, rtol=0, atol=1e-6)
        assert min(gradient.abs().max() for gradient in gradients.values()) > 1e-4


def test_it_trains_through_the_boundary_and_validates(train, corpus, tmp_path):
    """On tokens that count up, so that a model learns all of them in seconds."""
    counting = write_shards(tmp_path / "counting", [[[n % 50 for n in range(50_000)]]])
    data = [f"--{part}.dataset=token_shards" for part in ("training", "validation")]
    data += [f"--{part}.dataset_path={counting}" for part in ("training", "validation")]
    long = ("--superposition.steps=40", "--training.steps=80", "--optimizer.lr=1e-2")
    lines = train(ON[0], *OWN, *long, *validation(corpus), *data, "--validation.freq=40")
    losses = column(lines)
    assert losses[0] > 6.5
    assert losses[39] < math.log(S) + 0.5  # the least loss of bags of S different tokens: log S
    _, at_boundary, at_end = column(lines, VALIDATION_LOSS)
    assert at_boundary > 2  # single tokens are not trained yet
    assert max(losses[-1], at_end) < 0.5
    tokens = {line["step"]: line["n_tokens_seen"] for line in lines if TRAINING_LOSS in line}
    assert (tokens[40], tokens[80]) == (40 * S * B * L, 40 * (S + 1) * B * L)


@pytest.mark.parametrize("step", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1])
def test_it_resumes_exactly(finished, train, tmp_path, step):
    whole = finished(*ON, *OWN, *SAVE)
    kept = tmp_path / "run" / "checkpoint" / f"step-{step}"
    shutil.copytree(whole.checkpoints / f"step-{step}", kept)
    lines = train(*ON, *OWN, *SAVE)
    assert {line["step"]: line[TRAINING_LOSS] for line in lines} == {
        later: loss for later, loss in whole.losses.items() if later > step
    }
    last = f"checkpoint/step-{STEPS}"
    expected = load_full(whole.folder / last)
    for name, value in load_full(tmp_path / "run" / last).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "args",
    [
        ("--activation_checkpoint.mode=selective",),
        ("--compile.enable", "--compile.backend=aot_eager"),
        ("--lm_head.chunks=3",),
    ],
    ids=["selective AC", "compile", "LM head in chunks"],
)
def test_it_composes_with_upstreams(finished, train, args):
    plain = finished(*ON, *OWN, *SAVE).lines
    assert column(train(*ON, *OWN, *args)) == pytest.approx(column(plain), rel=1e-5)


class WithValues(example.OwnModel):
    """The model with a second embedding of the token ids."""

    def __init__(self, args):
        super().__init__(args)
        self.values = BagEmbedding(args.vocab_size, args.dim)

    def forward(self, tokens):
        x = self.tok_embeddings(tokens) + self.values(tokens)  # (B, L, d), also for bags
        for block in self.layers.values():
            x = block(x)
        return self.output(self.norm(x))


def test_a_second_embedding_of_the_ids(train, monkeypatch):
    spec = dataclasses.replace(example.train_spec(), model_cls=WithValues)
    monkeypatch.setitem(train_spec_module._extra_train_specs, "own_model", spec)
    losses = column(train(*ON, *OWN))
    assert len(losses) == STEPS
    assert all(abs(loss - math.log(1024)) < 1.5 for loss in losses)


def train_on_ranks(args):
    """Train the example in this process, one of several."""
    load_example("own_model")
    ranks.train(args)


def train_with_fully_shard_alone(args):
    """As torch's own tutorials shard a model, which makes the gradient a mean over ranks."""

    def shard(model, parallel_dims, job_config):
        if parallel_dims.fsdp_enabled:
            for block in model.layers.values():
                fully_shard(block, mesh=parallel_dims.get_mesh("fsdp"))
            fully_shard(model, mesh=parallel_dims.get_mesh("fsdp"))
        return model

    load_example("own_model")
    get_train_spec("own_model").parallelize_fn = shard
    ranks.train(args)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "own_model", OWN)
        patch.setattr(ranks, "train", train_on_ranks)
        yield Runs(tmp_path_factory.mktemp("runs"), STEPS)


@pytest.mark.parametrize(
    "layout",
    [
        Layout({"shard": 2}),
        pytest.param(Layout({"replicate": 2}), marks=pytest.mark.slow),
        pytest.param(Layout({"replicate": 2, "shard": 2}), marks=pytest.mark.slow),
        pytest.param(Layout({"PP": 2}), marks=pytest.mark.slow),
        pytest.param(Layout({"shard": 2, "PP": 2}), marks=pytest.mark.slow),
        pytest.param(
            Layout({"shard": 2}, job=("--superposition.bag_size=8,4,2",), note="stages"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda layout: layout.name,
)
def test_many_processes_agree_with_one(runs, layout):
    result = runs.compare(layout, "own_model")
    assert result.agrees, result.error or result


@pytest.mark.slow
def test_fully_shard_alone_is_enough(runs, monkeypatch):
    monkeypatch.setattr(ranks, "train", train_with_fully_shard_alone)
    result = runs.compare(Layout({"shard": 2}, note="by hand"), "own_model")
    assert result.agrees, result.error or result


@pytest.mark.parametrize("description", [conformance_of_trainer, conformance_of_own_model])
def test_conformance(description):
    assert [f"{result}" for result in check(description.TST) if result.problem] == []


def test_the_toml_is_checked_and_planned(tst, demo):
    checked = tst("check", TOML, *demo)
    assert (checked.code, checked.stderr) == (0, "")
    assert "own_model small, 320,576 parameters, on 2 ranks" in checked.stdout
    planned = tst("plan", TOML, *demo)
    assert planned.code == 0, planned.stderr
    assert "own_model small, 320,576 parameters" in planned.stdout
    assert "Memory: " in planned.stdout
    tried = tst("dry-run", TOML, *demo, "--ranks=2")
    assert tried.code == 0, tried.stdout
    assert "2 B200 (dp_shard 2)" in tried.stdout


def test_flops_are_those_that_torch_counts():
    """Of a forward; backward has twice as many. Norms count as matrices do, as in TorchTitan."""
    args = example.OwnModelArgs()
    model = example.OwnModel(args)
    model.init_weights()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 64, dtype=torch.int64))
    parameters, flops = args.get_nparams_and_flops(model, 64)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert flops == pytest.approx(3 * counter.get_total_flops() / 64, rel=0.01)


def test_a_checkpoint_is_an_ordinary_model(finished):
    """Of the last step, and of the boundary."""
    run = finished(*ON, *OWN, *SAVE)
    model = example.load_model(str(run.checkpoints / f"step-{STEPS}"))
    saved = load_full(run.checkpoints / f"step-{STEPS}")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert type(model.tok_embeddings) is torch.nn.Embedding
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 1024)
    example.load_model(str(run.checkpoints / f"step-{BOUNDARY}"))


# What does not work, and what says so


@pytest.mark.parametrize("kind", ["tensor", "context"])
def test_what_the_model_refuses(make_config, kind):
    with pytest.raises(
        ConfigError,
        match=rf"^your code refuses this job: parallelism.{kind}_parallel_degree must be 1 .*"
        r"own_model\.py, line \d+\)$",
    ):
        check_start(make_config(*OWN, f"--parallelism.{kind}_parallel_degree=2"), 2)


def test_what_is_for_llama_and_qwen_only(tst, demo, finished, tmp_path, offline_harness):
    layouts = tst("plan", TOML, *demo, "--layouts", "--ranks=8")
    assert "layouts are listed for these only" in layouts.stderr
    checkpoint = finished(*ON, *OWN, *SAVE).checkpoints / f"step-{STEPS}"
    for command in (
        ("export", checkpoint, tmp_path / "out"),
        ("sample", checkpoint),
        ("evaluate", checkpoint, "--tasks=no_task"),  # before it looks for the task
    ):
        found = tst(*command)
        assert (found.code, found.stdout) == (2, "")
        assert found.stderr.endswith(
            "model.name = 'own_model': must be llama3 or qwen3 to be exported\n"
        )
