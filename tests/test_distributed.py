"""The same job on several processes and on one, from the same initial weights."""

import dataclasses
import shutil

import pytest
import torch

from jobs import BOUNDARY, ON, SAVE, STEPS, TST, column, load_full, validation
from torchtitan.experiments.tst.metrics_file import TRAINING_LOSS, VALIDATION_LOSS, read_metrics
from torchtitan.experiments.tst.testing import ranks
from torchtitan.experiments.tst.testing.layouts import (
    GLOBAL_BATCH,
    LAYOUTS,
    MODELS,
    TOLERANCE,
    Layout,
)
from torchtitan.experiments.tst.testing.runs import Runs
from torchtitan.experiments.tst.upstream import parallelize

# of scripts/check_parallelism.py, which runs them all
IN_CI = {
    ("llama3", "DDP 2"),
    ("qwen3", "FSDP 2"),
    ("llama3", "FSDP 2, 2 micro-batches"),
    ("llama3", "DDP 2, 2 micro-batches"),
    ("llama3", "HSDP 2x2"),
    ("qwen3", "TP 2"),
    ("llama3", "TP 2, without loss parallel"),
    ("llama3", "CP 2, headtail"),
    ("qwen3", "CP 2, no load balancer"),
    ("llama3", "PP 2, 1F1B"),
    ("llama3", "PP 2, Interleaved1F1B"),
    ("llama3", "PP 2, s times the sequences"),
    ("qwen3 MoE", "FSDP 2 + EP 2"),
    ("qwen3 MoE", "TP 2 + EP 2"),
    ("qwen3 MoE", "FSDP 2 + TP 2 + EP 2 + ETP 2"),
    ("llama3", "FSDP 2, flex, documents"),
    ("qwen3", "FSDP 2, checkpointing selective"),
    ("llama3", "TP 2, bce"),
    ("llama3", "CP 2, bags out"),
    ("qwen3", "TP 2, LM head in chunks"),
    ("llama3", "FSDP 2, stages"),
    ("llama3", "CP 2, stages, s times the sequences"),
    ("llama3", "PP 2, stages"),
    ("qwen3 MoE", "FSDP 2 + EP 2, stages"),
    ("qwen3 MoE", "FSDP 2 + EP 2, auxiliary loss, 2 micro-batches"),
    ("qwen3 MoE", "DDP 2, auxiliary loss"),
    ("qwen3 MoE", "TP 2 + EP 2, auxiliary loss"),
    ("qwen3 MoE", "FSDP 2 + EP 2, bias"),
    ("llama4", "PP 2, GPipe, auxiliary loss"),
    ("llama4", "PP 2, 1F1B, bias"),
}


ONE = Layout({}, note="one process")


def named(name):
    (found,) = (layout for layout in LAYOUTS if layout.name == name)
    return found


def identity(value):
    return getattr(value, "name", str(value))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), STEPS)


def cells():
    every = {(model, layout.name): layout for layout in LAYOUTS for model in layout.models}
    assert every.keys() >= IN_CI
    for (model, name), layout in every.items():
        if not layout.gpu:
            marks = () if (model, name) in IN_CI else pytest.mark.slow
            yield pytest.param(model, layout, marks=marks, id=f"{model}: {name}")


@pytest.mark.parametrize(("model", "layout"), cells())
def test_agrees_with_one_process(runs, model, layout):
    """Both phases, with unequal numbers of ignored labels on the ranks."""
    result = runs.compare(layout, model)
    assert result.agrees, result.error or result


def test_a_wrong_gradient_is_seen(runs, monkeypatch):
    """DDP as it is upstream's, which takes the mean over ranks of what is to be added up."""
    monkeypatch.setattr(ranks, "train", train_with_upstreams_ddp)
    result = runs.compare(dataclasses.replace(named("DDP 2"), note="halved"), "llama3")
    assert not result.agrees
    assert result.superposition.grad_norm == pytest.approx(0.5, rel=0.05)


def train_with_upstreams_ddp(args):
    parallelize._add_up_over_replicas = lambda model, replicas: None
    ranks.train(args)


@pytest.fixture(scope="module")
def train_under(runs, tmp_path_factory):
    """The folder of a run of a model under a layout, trained when it is first asked for."""
    folders = {}

    def run(model, layout, *args):
        arguments = (*MODELS[model], *layout.arguments, *args)
        if arguments not in folders:
            folder = folders[arguments] = tmp_path_factory.mktemp("run") / "run"
            log = runs.train(arguments, layout.processes, folder)
            assert log is None, log
        return folders[arguments]

    return run


@pytest.fixture
def go_on(runs, train_under, tmp_path):
    """Train a job under one layout, and go on under another from one of its checkpoints."""
    saving = ("--checkpoint.interval=2", "--checkpoint.no-last-save-model-only")

    def run(model, first, second, step):
        before, after = train_under(model, first, *saving), tmp_path / "run"
        checkpoint = f"checkpoint/step-{step}"
        shutil.copytree(before / checkpoint, after / checkpoint)
        job = [*runs.job, *MODELS[model], *saving, *second.arguments]
        log = ranks.run(job, second.processes, after)
        assert log is None, log
        return ({line["step"]: line for line in read_metrics(run)} for run in (before, after))

    return run


CHANGES = {  # model, layouts, and the step after which the quick test resumes, None for no test
    ("llama3", "FSDP 2", "TP 2 + PP 2"): BOUNDARY,
    ("llama3", "TP 2 + PP 2", "FSDP 2 + CP 2"): None,
    ("llama3", "FSDP 2, stages", "PP 2, stages"): 2,  # the end of a stage
    ("qwen3", "TP 2 + CP 2", "DDP 2"): 2,
    ("qwen3 MoE", "TP 2 + EP 2", "FSDP 2 + EP 2"): BOUNDARY,
    ("qwen3 MoE", "TP 2 + EP 2", "FSDP 2 + CP 2 + EP 4"): None,
    ("qwen3 MoE", "FSDP 4 + EP 4", "FSDP 2 + TP 2 + EP 2 + ETP 2"): None,
}


@pytest.mark.parametrize(
    ("model", "first", "second", "step"),
    [
        pytest.param(
            *(model, named(first), named(second), step),
            marks=() if step == in_ci else pytest.mark.slow,
        )
        for (model, first, second), in_ci in CHANGES.items()
        for step in (2, BOUNDARY)
    ],
    ids=identity,
)
def test_goes_on_under_another_layout(runs, go_on, model, first, second, step):
    expected = runs.of_one_process(*MODELS[model], *first.job)
    before, after = go_on(model, first, second, step)
    assert list(after) == list(range(step + 1, STEPS + 1))
    for number, line in (before | after).items():
        of_one = expected[number - 1]
        assert line[TRAINING_LOSS] == pytest.approx(of_one.losses[TRAINING_LOSS], rel=TOLERANCE)
        assert line["grad_norm"] == pytest.approx(of_one.grad_norm, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("model", "few", "many"),
    [
        ("llama3", ONE, named("TP 2")),
        pytest.param("qwen3 MoE", ONE, named("TP 2"), marks=pytest.mark.slow),
        ("llama3", ONE, named("CP 2, headtail")),
        ("llama3", ONE, named("CP 2, LM head in chunks")),
        ("qwen3", ONE, named("CP 2, headtail")),
        ("llama3", ONE, named("PP 2, 1F1B")),
        pytest.param("llama3", ONE, named("TP 2 + PP 2"), marks=pytest.mark.slow),
        pytest.param("llama3", named("FSDP 2"), named("FSDP 2 + CP 2"), marks=pytest.mark.slow),
        pytest.param("llama3", ONE, named("TP 2 + CP 2 + PP 2"), marks=pytest.mark.slow),
    ],
    ids=identity,
)
def test_validation(runs, train_under, model, few, many):
    """Before, at and after the boundary."""
    args = (*validation(runs.folder / "corpus"), "--validation.freq=2")
    args += (f"--validation.local_batch_size={GLOBAL_BATCH}",)
    of_few, of_many = (
        column(read_metrics(train_under(model, layout, *args)), VALIDATION_LOSS)
        for layout in (few, many)
    )
    assert len(of_few) > 3
    assert of_many == pytest.approx(of_few, rel=TOLERANCE)


def test_chunked_head_in_bfloat16(train_under):
    """As the paper's runs have it: FSDP with bfloat16 parameters, whose gradients add up so too."""
    bfloat16 = "--training.mixed_precision_param=bfloat16"
    found = [
        read_metrics(train_under("llama3", named("FSDP 2"), bfloat16, f"--lm_head.chunks={chunks}"))
        for chunks in (1, 3)
    ]
    for whole, chunked in zip(*found, strict=True):
        assert chunked[TRAINING_LOSS] == pytest.approx(whole[TRAINING_LOSS], rel=1e-3)
        assert chunked["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-2)


def test_reinit_at_recovery_after_a_validation_at_the_boundary(launch, corpus, tmp_path):
    """A validation leaves the LM head unsharded, as FSDP expects a backward to follow."""
    launch(
        TST,
        *ON,
        "--superposition.reinit_at_recovery=output",
        "--optimizer.lr=1e-30",
        *validation(corpus),
        "--validation.freq=3",
        "--training.steps=4",
        *SAVE,
        f"--job.dump_folder={tmp_path}",
        processes=2,
    )
    at_boundary, after = (load_full(tmp_path / f"checkpoint/step-{step}") for step in (3, 4))
    assert not torch.allclose(at_boundary["output.weight"], after["output.weight"])
    assert torch.allclose(at_boundary["tok_embeddings.weight"], after["tok_embeddings.weight"])
