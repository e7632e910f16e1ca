"""The example for the Hugging Face Trainer: its losses and gradients."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance_of_hf_trainer import (
    LLAMA,
    QWEN3_MOE,
    TST,
    TSTOfQwen3,
    TSTOfQwen3Moe,
    example,
    new_model,
)
from conformance_of_hf_trainer import L as LATENTS
from hf_trainer_runs import BOUNDARY, losses, run, tokens
from transformers import AutoConfig, LlamaForCausalLM, Qwen3MoeConfig

from jobs import B, L, RecordingTrainer, S, column, superposition
from torchtitan.experiments.tst.core import IGNORE_INDEX, Schedule
from torchtitan.experiments.tst.core.conformance import check
from torchtitan.experiments.tst.results.transformers_config import config_of


def assert_close(found: dict, expected: dict) -> None:
    """Compare gradients: within 1e-6, and within 1e-4 of the largest of the weight."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(
            found[name],
            gradient,
            rtol=0,
            atol=min(1e-6, 1e-4 * largest),
            msg=lambda m, n=name: n + m,
        )


@pytest.mark.parametrize(
    "implementation", [TST, TSTOfQwen3, pytest.param(TSTOfQwen3Moe, marks=pytest.mark.slow)]
)
def test_conformance(implementation):
    assert [str(result) for result in check(implementation) if result.problem] == []


# Equal to our trainer


class GradientsOfOurs(RecordingTrainer):
    """Keeps the weights and the gradients of each step, by their names in transformers."""

    def before_clipping(self, parameters):
        super().before_clipping(parameters)
        (model,) = self.model_parts
        to_hf = self.train_spec.state_dict_adapter(self.model_args, None).to_hf
        named = dict(model.named_parameters())
        self.weights = to_hf({name: p.detach().clone() for name, p in named.items()})
        self.__dict__.setdefault("gradients", []).append(
            to_hf({name: p.grad.clone() for name, p in named.items()})
        )

    def close(self):
        type(self).last = self
        super().close()


@pytest.mark.parametrize(
    ("name", "flavor"), [("llama3", "demo"), ("qwen3", "debugmodel_tiny")], ids=["llama", "qwen3"]
)
def test_losses_and_gradients_are_our_trainers(train, monkeypatch, tmp_path, name, flavor):
    args = (
        f"--model.name={name}",
        f"--model.flavor={flavor}",
        "--training.steps=2",
        "--training.max_norm=1e9",  # gradients as they are
        "--optimizer.lr=0",
        "--debug.seed=1",
    )
    lines = train(*args, *superposition(S, 1), trainer_class=GradientsOfOurs)
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable)
    ours = GradientsOfOurs.last
    # the windows that ours has read
    windows = [torch.cat([inputs, labels[:, -1:]], 1).flatten() for inputs, labels in ours.read[:2]]
    stream = torch.cat(windows).numpy()
    config = config_of(ours.job_config, ours.model_args, ours.model_parts[0].state_dict())
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = new_model(AutoConfig.from_pretrained(tmp_path))
    model.load_state_dict(ours.weights)
    trainer, gradients = run(
        tmp_path,
        model,
        stream,
        Schedule.of([S], [1]),
        L,
        max_steps=2,
        per_device_train_batch_size=B,
        learning_rate=0.0,
        max_grad_norm=0.0,
    )
    assert losses(trainer) == pytest.approx(column(lines), rel=1e-6)
    for found, expected in zip(gradients.steps, ours.gradients, strict=True):
        assert_close(found, expected)


# One mean over micro-batches and ranks


class Masking(example.Collator):
    """Ignores token 0 as a target."""

    def __call__(self, windows):
        batch = super().__call__(windows)
        key = "shift_labels" if "shift_labels" in batch else "labels"
        batch[key] = batch[key].masked_fill(batch[key] == 0, IGNORE_INDEX)
        return batch


def masked_run(folder: Path, **options):
    """A run whose later windows have ever fewer targets; gives losses and gradients."""
    stream = tokens(2 * 4 * (S * LATENTS + 1) + 3 * 4 * (LATENTS + 1))
    share = np.tile(np.linspace(0, 0.95, 85), len(stream) // 85 + 1)[: len(stream)]
    stream[np.random.default_rng(1).random(len(stream)) < share] = 0
    model = new_model(LLAMA)
    options |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    trainer, gradients = run(folder, model, stream, collator=Masking(LATENTS), **options)
    return losses(trainer), gradients.steps


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory):
    return masked_run(tmp_path_factory.mktemp("one"), per_device_train_batch_size=4)


def assert_same_steps(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for step, expected_step in zip(found[1], expected[1], strict=True):
        assert_close(step, expected_step)


def test_accumulated_micro_batches_are_one_batch(one_batch, tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_same_steps(masked_run(tmp_path, **options), one_batch)


def test_micro_batches_are_one_batch_for_a_model_that_does_not_know_their_number(
    one_batch, tmp_path, monkeypatch
):
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    found = masked_run(tmp_path, **options)
    # recovery is the Trainer's own, which takes the mean of such a model's means
    assert_same_steps([part[:BOUNDARY] for part in found], [part[:BOUNDARY] for part in one_batch])


def test_load_of_experts_is_in_the_loss_of_both_phases(tmp_path):
    def first_losses(**changes):
        config = Qwen3MoeConfig(**QWEN3_MOE.to_dict() | changes)
        options = {"learning_rate": 0.0, "max_steps": 2, "gradient_accumulation_steps": 2}
        trainer, _ = run(tmp_path, new_model(config), tokens(), Schedule.of([S], [1]), **options)
        return np.array(losses(trainer))

    load = first_losses(output_router_logits=True, router_aux_loss_coef=1.0) - first_losses()
    assert load[0] == pytest.approx(load[1], rel=0.1)
    assert load[0] > 1


def run_on_rank(folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate starts threads, which block after a fork
    found = masked_run(
        folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        save_strategy="no",
    )
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")
        assert (folder / f"boundary-{BOUNDARY}" / "rng_state_1.pth").is_file()


@pytest.mark.slow
def test_two_ranks_are_one_batch(one_batch, on_ranks, tmp_path):
    on_ranks(2, run_on_rank, tmp_path)
    found = torch.load(tmp_path / "found.pt")
    assert_same_steps(found, one_batch)
    # one process continues what two have begun, if a step has as many windows
    resume = str(tmp_path / f"boundary-{BOUNDARY}")
    resumed = masked_run(tmp_path / "resumed", per_device_train_batch_size=4, resume=resume)
    assert_same_steps(resumed, (found[0], found[1][BOUNDARY:]))
