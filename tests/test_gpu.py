"""What CPU tests cannot see; ``scripts/test.sh -m gpu`` on a machine with a GPU."""

import dataclasses
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torchtitan.models.llama3 import llama3_args
from torchtitan.train import Trainer

from conftest import ROOT
from torchtitan.experiments.tst.checkpoint import files
from torchtitan.experiments.tst.core import LOSSES, BagLoss, losses
from torchtitan.experiments.tst.core.head import chunked_loss
from torchtitan.experiments.tst.data.shards_loader import ShardsDataloader
from torchtitan.experiments.tst.metrics import TRAINING_LOSS
from torchtitan.experiments.tst.trainer import SuperpositionTrainer

pytestmark = pytest.mark.gpu

JOB = (
    "--superposition.bag_size=4",
    "--superposition.steps=10",
    "--training.steps=20",
    "--training.mixed_precision_param=bfloat16",
    "--optimizer.lr=1e-2",
)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
def test_bag_loss_is_that_of_the_cpu_in_float64(loss, dtype, tolerance, compiled):
    torch.manual_seed(0)
    logits = (4 * torch.randn(2, 16, 1000)).to(dtype)
    labels = torch.randint(1000, (2, 16, 6))
    labels[:, -1, 1:] = -100
    bag_loss = BagLoss(loss)
    exact = logits.double().requires_grad_()
    expected = bag_loss(exact, labels)
    (expected_grad,) = torch.autograd.grad(expected, exact)

    on_gpu = logits.cuda().requires_grad_()
    summed = torch.compile(bag_loss.sum) if compiled else bag_loss.sum
    coefficients = bag_loss.coefficients(bag_loss.counts(labels.cuda()))
    value = summed(on_gpu, labels.cuda(), coefficients)
    (grad,) = torch.autograd.grad(value, on_gpu)
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    error = (grad.cpu().double() - expected_grad).norm() / expected_grad.norm()
    assert error < tolerance


def test_blocks_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK_OF_ACCELERATOR", 7 * 1000)
    test_bag_loss_is_that_of_the_cpu_in_float64("mce", torch.bfloat16, 1e-2, compiled=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_chunked_head_is_that_of_the_cpu_in_float64(dtype, tolerance):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 64, 32, dtype=dtype), torch.randn(1000, 32, dtype=dtype) / 4
    labels = torch.randint(1000, (2, 64, 6))
    bag_loss = BagLoss("mce", overwrite_logits=True)
    results = []
    for device, kind, chunks in (("cpu", torch.float64, 1), ("cuda", dtype, 4)):
        h, w = (x.to(device, kind).requires_grad_() for x in (hidden, weight))
        coefficients = bag_loss.coefficients(bag_loss.counts(labels.to(device)))
        loss = chunked_loss(
            h, w, labels.to(device), lambda z, y, c=coefficients: bag_loss.sum(z, y, c), chunks
        )
        gradients = torch.autograd.grad(loss, (h, w))
        results.append([value.detach().cpu().double() for value in (loss, *gradients)])
    for exact, value in zip(*results, strict=True):
        assert (value - exact).norm() / exact.norm() < tolerance


def waits_for_the_device(config, trainer_class):
    """In a whole run; torch warns of each."""
    trainer = trainer_class(config)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.close()
        torch.distributed.destroy_process_group()
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("ratio", [0.02, 0.98], ids=["recovery", "superposition"])
def test_no_wait_for_the_device_that_upstreams_step_does_not_have(make_config, one_process, ratio):
    def in_a_step(trainer_class, *args):
        short, long = (
            waits_for_the_device(
                make_config("--metrics.log_freq=1000", f"--training.steps={steps}", *args),
                trainer_class,
            )
            for steps in (60, 100)
        )
        return (long - short) / 40

    phase = ("--superposition.bag_size=4", f"--superposition.step_ratio={ratio}")
    assert in_a_step(SuperpositionTrainer, *phase) <= in_a_step(Trainer)


@pytest.mark.parametrize(
    "args",
    [(), ("--compile.enable",), ("--compile.enable", "--lm_head.chunks=4")],
    ids=["eager", "compiled", "chunked"],
)
def test_both_phases_train_in_bfloat16(train, args):
    values = [line[TRAINING_LOSS] for line in train(*JOB, *args)]
    assert values[9] < values[0]
    assert values[19] < values[10]


@pytest.mark.parametrize("args", [(), ("--compile.enable",)], ids=["eager", "compiled"])
def test_variable_length_attention_is_flex_attention(train, monkeypatch, args):
    """Two ways to the same masks, of documents of bags and of tokens."""
    found = []
    for attention in ("flex", "varlen"):
        model = dataclasses.replace(
            llama3_args["demo"], attn_type=attention, attn_mask_type="block_causal"
        )
        monkeypatch.setitem(llama3_args, f"demo_{attention}", model)
        lines = train(*JOB, f"--model.flavor=demo_{attention}", *args)
        found.append([line[TRAINING_LOSS] for line in lines])
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_memory_is_what_the_dry_run_says(train):
    job = [*JOB, "--model.flavor=debugmodel", "--training.seq_len=512"]
    job += ["--training.local_batch_size=32", "--training.mixed_precision_param=float32"]
    code = (
        "import sys; from plan import *;"
        "config = SuperpositionConfigManager().parse_args(sys.argv[1:]);"
        "print(max(memory.peak for memory in dry_run(config, 1).memory.values()))"
    )
    command = [sys.executable, "-c", code, *job]
    scripts = str(ROOT / "scripts")
    said = float(subprocess.check_output(command, cwd=scripts, text=True).splitlines()[-1])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(*job)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(said, rel=0.1)


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_resume_at_the_boundary(train, tmp_path, mode):
    args = (*JOB, "--checkpoint.enable", "--checkpoint.interval=4")
    args += (f"--checkpoint.async_mode={mode}",)
    whole = [line[TRAINING_LOSS] for line in train(*args)]
    shutil.move(tmp_path / "run", tmp_path / "whole")
    source = tmp_path / "whole/checkpoint/step-10"
    assert files.damages(source, files.read_manifest(source)["files"]) == []
    shutil.copytree(source, tmp_path / "run/checkpoint/step-10")
    resumed = [line[TRAINING_LOSS] for line in train(*args)]
    assert resumed == pytest.approx(whole[10:], rel=1e-3)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_token_shards_are_pinned(make_config, tokens, workers):
    config = make_config(
        "--training.dataset=token_shards",
        f"--training.dataset_path={tokens}",
        "--training.dataloader.pin_memory",
        f"--training.dataloader.num_workers={workers}",
    )
    inputs, labels = next(iter(ShardsDataloader(1, 0, None, config)))
    assert inputs["input"].is_pinned() and labels.is_pinned()
