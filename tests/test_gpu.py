"""What CPU tests cannot see; ``scripts/test.sh -m gpu`` on a machine with a GPU."""

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.models.llama3 import Transformer, llama3_args
from torchtitan.models.llama3.infra.parallelize import apply_fsdp
from torchtitan.train import Trainer

from jobs import ROOT, TST, poisoned_at, tensorboard_scalars
from launches import signal_every_process
from torchtitan.experiments.tst.core import LOSSES, BagEmbedding, BagLoss, LossHead, losses
from torchtitan.experiments.tst.core.head import chunked_loss
from torchtitan.experiments.tst.data.shards.loader import ShardsDataloader
from torchtitan.experiments.tst.metrics_file import TRAINING_LOSS
from torchtitan.experiments.tst.resilience.checkpoint import inventory, manifests
from torchtitan.experiments.tst.resilience.stop import STOPPED_EXIT_CODE
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

pytestmark = pytest.mark.gpu

JOB = (
    "--superposition.bag_size=4",
    "--superposition.steps=10",
    "--training.steps=20",
    "--training.mixed_precision_param=bfloat16",
    "--optimizer.lr=1e-2",
)
SAVE = ("--checkpoint.enable", "--checkpoint.interval=4")
DETERMINISTIC = ("--debug.deterministic",)


@pytest.fixture(autouse=True)
def not_deterministic():
    """As torch is by itself; a run with debug.deterministic leaves it so."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, False


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
def test_bag_loss_is_that_of_the_cpu_in_float64(loss, dtype, tolerance, compiled):
    torch.manual_seed(0)
    logits = (4 * torch.randn(2, 16, 1000)).to(dtype)
    labels = torch.randint(1000, (2, 16, 6))
    labels[:, :4, 1:3] = labels[:, :4, :1]
    labels[:, -1, 1:] = -100
    bag_loss = BagLoss(loss)
    exact = logits.double().requires_grad_()
    expected = bag_loss(exact, labels)
    (expected_grad,) = torch.autograd.grad(expected, exact)

    on_gpu = logits.cuda().requires_grad_()
    torch.compiler.reset()  # or compilations of other tests count to a limit
    summed = torch.compile(bag_loss.sum) if compiled else bag_loss.sum
    coefficients = bag_loss.coefficients(bag_loss.counts(labels.cuda()))
    value = summed(on_gpu, labels.cuda(), coefficients)
    (grad,) = torch.autograd.grad(value, on_gpu, retain_graph=True)
    assert torch.equal(grad, *torch.autograd.grad(value, on_gpu))  # in whatever order it is added
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_bag_embedding_is_that_of_the_cpu_in_float64(dtype, tolerance):
    """One token is in every bag, as frequent ones are, and gets the gradients of all of them."""
    torch.manual_seed(0)
    bags = torch.randint(1000, (4, 128, 16))
    bags[..., 0] = 7
    weight = torch.randn(1000, 64, dtype=dtype)
    grad_output = torch.randn(4, 128, 64, dtype=dtype)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype), ("cuda", dtype)):
        embedding = BagEmbedding(1000, 64, device=device, dtype=kind)
        with torch.no_grad():
            embedding.weight.copy_(weight)
        output = embedding(bags.to(device))
        (grad,) = torch.autograd.grad(output, embedding.weight, grad_output.to(device, kind))
        results.append((output.detach().cpu(), grad.cpu()))
    for exact, value, again in zip(*results, strict=True):
        assert (value.double() - exact).norm() / exact.norm() < tolerance
        assert torch.equal(value, again)


def sharded_model_and_whole(device):
    """The same demo model: by FSDP2 with mixed precision, and in float32 without."""
    torch.manual_seed(0)
    whole = Transformer(llama3_args["demo"])
    whole.tok_embeddings = BagEmbedding.from_embedding(whole.tok_embeddings)
    whole.output = LossHead.from_linear(whole.output, chunks=4)
    with torch.no_grad():
        whole.init_weights()
    whole.to(device)
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    apply_fsdp(sharded, mesh, torch.bfloat16, torch.float32, pp_enabled=False)
    return sharded, whole


def test_fsdp_with_mixed_precision(one_process, device="cuda"):
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    models = sharded_model_and_whole(device)
    bags, labels = torch.randint(1000, (2, 4, 128, 6), device=device)
    bag_loss = BagLoss("mce", overwrite_logits=True)
    coefficients = bag_loss.coefficients(bag_loss.counts(labels)).float()
    results = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*returned a view tensor.*")
        for model in models:
            model.output.expect(labels, lambda z, y: bag_loss.sum(z, y, coefficients))
            loss = model(bags)
            loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters()}
            full = {
                n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()
            }
            results.append((loss.item(), full))
    (loss, gradients), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 5e-2, name


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


@pytest.mark.parametrize("phase", ["recovery", "superposition"])
def test_no_wait_for_the_device_that_upstreams_step_does_not_have(make_config, one_process, phase):
    def in_a_step(trainer_class, *args):
        """From two runs that log equally many lines. Each line waits for the device."""
        waits = []
        for steps in (60, 100):
            job = ["--metrics.log_freq=1000", f"--training.steps={steps}", *args]
            if args:
                boundary = 2 if phase == "recovery" else steps - 2
                job.append(f"--superposition.steps={boundary}")
            waits.append(waits_for_the_device(make_config(*job), trainer_class))
        short, long = waits
        return (long - short) / 40

    assert in_a_step(SuperpositionTrainer, "--superposition.bag_size=4") <= in_a_step(Trainer)


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--compile.enable",),
        ("--compile.enable", "--lm_head.chunks=4"),
        ("--compile.enable", "--superposition.scale=batch"),
        ("--compile.enable", "--superposition.bag_size=8,4,2"),
    ],
    ids=["eager", "compiled", "chunked", "another shape in each phase", "stages"],
)
def test_both_phases_train_in_bfloat16(train, args):
    values = [line[TRAINING_LOSS] for line in train(*JOB, *args)]
    assert values[9] < values[0]
    assert values[19] < values[10]


@pytest.mark.slow  # flex attention is compiled with autotuning
@pytest.mark.parametrize("args", [(), ("--compile.enable",)], ids=["eager", "compiled"])
def test_variable_length_attention_is_flex_attention(train, monkeypatch, args):
    """Two ways to the same masks, of documents of bags and of tokens.

    Below 128 positions flex attention takes another kernel, which is not that of training.
    """
    found = []
    for attention in ("flex", "varlen"):
        model = dataclasses.replace(
            llama3_args["demo"], attn_type=attention, attn_mask_type="block_causal"
        )
        monkeypatch.setitem(llama3_args, f"demo_{attention}", model)
        job = (*JOB, f"--model.flavor=demo_{attention}", "--training.seq_len=256")
        lines = train(*job, "--optimizer.lr=1e-3", *args)
        found.append([line[TRAINING_LOSS] for line in lines])
    assert found[1] == pytest.approx(found[0], rel=1e-2)


@pytest.mark.slow  # scripts/check_gpu.sh has a larger model
def test_memory_is_what_the_dry_run_says(base_args, tmp_path):
    """As rank 0 of 8 under FSDP2, with some GB, beside which cuBLAS's workspaces are small."""
    job = [*base_args, "--model.flavor=debugmodel", "--training.mixed_precision_param=bfloat16"]
    job += ["--training.seq_len=2048", "--training.local_batch_size=32", "--parallelism."]
    job[-1] += "data_parallel_shard_degree=8"
    script = ROOT / "scripts" / "benchmark" / "memory.py"
    job += ["--superposition.bag_size=4", "--superposition.steps=10"]
    subprocess.run([sys.executable, script, f"--output={tmp_path}", *job], check=True)
    for phase, peak in json.loads((tmp_path / "memory.json").read_text())["peak_bytes"].items():
        assert peak["measured"] == pytest.approx(peak["dry_run"], rel=0.1), phase


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_resume_at_the_boundary(train, tmp_path, mode):
    args = (*JOB, *SAVE, *DETERMINISTIC, f"--checkpoint.async_mode={mode}")
    whole = [line[TRAINING_LOSS] for line in train(*args)]
    shutil.move(tmp_path / "run", tmp_path / "whole")
    source = tmp_path / "whole/checkpoint/step-10"
    assert manifests.damages(source, manifests.read_manifest(source)["files"]) == []
    shutil.copytree(source, tmp_path / "run/checkpoint/step-10")
    resumed = [line[TRAINING_LOSS] for line in train(*args)]
    assert resumed == whole[10:]


def scalars(run_folder):
    found = tensorboard_scalars(run_folder)
    return [found[key] for key in (TRAINING_LOSS, "grad_norm")]


def without_superposition(args):
    return [arg for arg in args if not arg.startswith("--superposition")]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_runs_are_torchtitans_own_bit_for_bit(train_upstream, train, tmp_path, compiled):
    """Without superposition; and in recovery, of TorchTitan's trainer from the boundary."""
    args = (*JOB, *SAVE, *DETERMINISTIC, "--metrics.enable_tensorboard")
    args += ("--compile.enable",) if compiled else ()
    train_upstream(*without_superposition(args))
    shutil.move(tmp_path / "run", tmp_path / "upstream")
    train(*without_superposition(args))
    assert scalars(tmp_path / "run") == scalars(tmp_path / "upstream")
    shutil.rmtree(tmp_path / "run")
    train(*args)
    shutil.move(tmp_path / "run", tmp_path / "phases")
    shutil.copytree(tmp_path / "phases/checkpoint/step-10", tmp_path / "run/checkpoint/step-10")
    train_upstream(*without_superposition(args))
    recovery = [values[10:] for values in scalars(tmp_path / "phases")]
    assert scalars(tmp_path / "run") == recovery


@pytest.fixture
def train_upstream(make_config, one_process):
    """TorchTitan's own trainer, in this process."""

    def run(*args):
        trainer = Trainer(make_config(*args))
        try:
            trainer.train()
        finally:
            trainer.close()
            dist.destroy_process_group()

    return run


def state_of(trainer):
    """Parameters and optimizer states, copied."""
    model, (optimizer,) = trainer.model_parts[0], trainer.optimizers.optimizers
    state = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}.{key}"] = value
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_no_trace(train, what):
    """The fused optimizer leaves it out on the device, and the host has not waited."""
    changed, pinned = {}, set()

    class Watching(poisoned_at(3, 12, what=what)):
        def train_step(self, data_iterator):
            before = state_of(self)
            super().train_step(data_iterator)
            after = state_of(self)
            same = before.keys() == after.keys()
            changed[self.step] = not (same and all(before[k].equal(after[k]) for k in after))
            assert self.step_check.on_device
            if self.step_check._unread:
                pinned.add(self.step_check._unread.values.is_pinned())

    job = (*JOB, "--metrics.log_freq=1000", "--resilience.max_skipped_steps=2")  # a log would read
    train(*job, trainer_class=Watching)
    assert pinned == {True}
    assert [step for step, has_changed in changed.items() if not has_changed] == [3, 12]


def test_reinitialisation_leaves_the_random_numbers_alone(train):
    found = []

    class Watching(SuperpositionTrainer):
        def _enter_recovery(self):
            before = torch.cuda.get_rng_state(), torch.get_rng_state()
            super()._enter_recovery()
            after = torch.cuda.get_rng_state(), torch.get_rng_state()
            assert all(a.equal(b) for a, b in zip(before, after, strict=True))
            found.append(self.model_parts[0].tok_embeddings.weight.detach().clone())

    for _ in range(2):
        train(*JOB, "--superposition.reinit_at_recovery=tok_embeddings", trainer_class=Watching)
    assert torch.equal(*found)
    assert found[0].std().item() == pytest.approx(1, rel=0.05)  # as at the start of a run


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("disabled", marks=pytest.mark.slow),
        pytest.param("async", marks=pytest.mark.slow),
        "async_with_pinned_mem",
    ],
)
def test_a_signal_to_every_process_ends_with_a_checkpoint(base_args, tmp_path, mode):
    """As Slurm sends it, to children too."""
    run = tmp_path / "run"
    job = [*base_args, *JOB, *SAVE, f"--checkpoint.async_mode={mode}", f"--job.dump_folder={run}"]
    job += ["--training.steps=20000", "--training.dataloader.num_workers=1"]
    code, output = signal_every_process(["-m", TST, *job], run, signal.SIGUSR1)
    assert code == STOPPED_EXIT_CODE, output
    last = inventory.list_checkpoints(run / "checkpoint")[-1].path
    assert f"Stopped after step {last.name.removeprefix('step-')} " in output
    assert manifests.damages(last, manifests.read_manifest(last)["files"]) == []


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
