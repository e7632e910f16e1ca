"""Experts: the methods that balance them, and the metrics that show it."""

import copy
import dataclasses
import shutil
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torchtitan.models.deepseek_v3 import deepseekv3_args
from torchtitan.models.qwen3 import Qwen3Model

from jobs import ON, SAVE, STEPS, B, L, column, validation
from torchtitan.experiments.tst.core import BagEmbedding
from torchtitan.experiments.tst.expert_metrics import AUXILIARY_LOSS, expert_metrics
from torchtitan.experiments.tst.metrics_file import TRAINING_LOSS
from torchtitan.experiments.tst.resilience.checkpoint.manifests import ContradictionError
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

QWEN3 = ("--model.name=qwen3", "--model.flavor=debugmodel_moe_tiny")
COEFFICIENT = 0.5  # at which the auxiliary loss has a part in every gradient
AUXILIARY = ("--load_balance.method=auxiliary_loss", f"--load_balance.coefficient={COEFFICIENT}")
BIAS = ("--load_balance.method=bias",)
STRONG_BIAS = (*BIAS, "--load_balance.coefficient=0.05")  # which soon changes choices
LARGEST = "experts/largest_share(%)"
EXPERTS, LAYERS, TOP_K = 4, 2, 2


def plain_loss(model, inputs, labels):
    """The loss of a model without any hook of ours, and the auxiliary loss of each layer."""
    logits, chosen, hooks = [], [], []
    for layer in model.layers.values():
        router = layer.moe.router
        hooks.append(router.gate.register_forward_hook(lambda m, a, out: logits.append(out)))
        hooks.append(router.register_forward_hook(lambda m, a, out: chosen.append(out[1])))
    output = model(inputs).flatten(0, 1)
    for hook in hooks:
        hook.remove()
    bags = labels.flatten(0, 1) if labels.ndim == 3 else labels.flatten()[:, None]
    language = torch.stack([F.cross_entropy(output, bag) for bag in bags.unbind(1)]).mean()
    auxiliary = []
    for of_layer, choices in zip(logits, chosen, strict=True):
        shares = F.one_hot(choices, EXPERTS).float().mean((0, 1))
        auxiliary.append(EXPERTS * (shares * F.softmax(of_layer, -1).mean(0)).sum())
    return language, torch.stack(auxiliary)


class ComparedWithPlain(SuperpositionTrainer):
    """Holds the gradients of each step to those of the plain loss of a plain model."""

    def post_dataloading_process(self, *args):
        batch = super().post_dataloading_process(*args)
        self.batch = batch[:2]
        return batch

    def train_step(self, data_iterator):
        super().train_step(data_iterator)
        counts, sums = self.load_balancer.load.totals()
        assert counts.sum(1).tolist() == [TOP_K * B * L] * LAYERS
        assert sums.sum(1).tolist() == pytest.approx([B * L] * LAYERS)

    def forward_backward_step(self, **kwargs):
        loss = super().forward_backward_step(**kwargs)
        model = self.model_parts[0]
        plain = Qwen3Model(copy.deepcopy(self.model_args))
        plain.tok_embeddings = BagEmbedding.from_embedding(plain.tok_embeddings)
        plain.load_state_dict(model.state_dict())
        plain.freqs_cis = plain.rope_cache = model.rope_cache
        language, auxiliary = plain_loss(plain, *self.batch)
        (language + COEFFICIENT * auxiliary.sum()).backward()
        torch.testing.assert_close(loss, language)  # what is reported is without it
        for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
        self.auxiliary.append(auxiliary.mean().item())
        return loss

    auxiliary: ClassVar = []


@pytest.mark.parametrize("scale", ["sequence", "batch"])
def test_auxiliary_loss_is_that_of_plain_pytorch(train, scale):
    class Trainer(ComparedWithPlain):
        auxiliary: ClassVar = []

    lines = train(*QWEN3, *ON, *AUXILIARY, f"--superposition.scale={scale}", trainer_class=Trainer)
    assert column(lines, AUXILIARY_LOSS) == pytest.approx(Trainer.auxiliary, rel=1e-5)
    assert len(Trainer.auxiliary) == STEPS


class WithTotals(SuperpositionTrainer):
    """Keeps the counts and the sums of probabilities of each step."""

    def train_step(self, data_iterator):
        super().train_step(data_iterator)
        self.totals.append(torch.stack(self.load_balancer.load.totals()))


def test_recomputation_counts_once(train, tmp_path):
    """Counts, losses and gradients are those without activation checkpointing."""
    job = (*QWEN3, *ON, *AUXILIARY)
    for mode in ("none", "full", "selective"):

        class Trainer(WithTotals):
            totals: ClassVar = []

        checkpointing = f"--activation_checkpoint.mode={mode}"
        folder = f"--job.dump_folder={tmp_path / mode}"
        lines = train(*job, checkpointing, folder, trainer_class=Trainer)
        if mode == "none":
            plain, totals = lines, Trainer.totals
        for key in (TRAINING_LOSS, "grad_norm", AUXILIARY_LOSS, LARGEST):
            assert column(lines, key) == column(plain, key), (mode, key)
        assert torch.equal(torch.stack(Trainer.totals), torch.stack(totals)), mode
    assert len(totals) == STEPS


LLAMA4 = ("--model.name=llama4", "--model.flavor=tiny")  # with experts in every second layer


def test_bias_is_upstreams_own_of_llama4(train, tmp_path):
    """The same hook for every model: with Llama 4 it is its own, and without it there is none."""
    runs = {}
    for method in ("upstream", "bias", "none"):
        folder = f"--job.dump_folder={tmp_path / method}"
        runs[method] = train(*LLAMA4, *ON, f"--load_balance.method={method}", folder)
    for key in (TRAINING_LOSS, "grad_norm", LARGEST):
        assert column(runs["bias"], key) == column(runs["upstream"], key)
    assert column(runs["none"]) != column(runs["bias"])
    assert {k for k in runs["bias"][0] if k.startswith(f"{LARGEST}/")} == {
        f"{LARGEST}/layer_1",
        f"{LARGEST}/layer_3",
    }


class Biases(SuperpositionTrainer):
    def train_step(self, data_iterator):
        super().train_step(data_iterator)
        layers = self.model_parts[0].layers.values()
        self.biases.append([layer.moe.expert_bias.tolist() for layer in layers])


@pytest.mark.parametrize("method", ["none", "auxiliary_loss"])
def test_others_have_no_bias(train, method):
    class Trainer(Biases):
        biases: ClassVar = []

    train(*QWEN3, *ON, f"--load_balance.method={method}", trainer_class=Trainer)
    assert Trainer.biases == [[[0.0] * EXPERTS] * LAYERS] * STEPS


def test_validation_does_not_move_the_bias(train, corpus, tmp_path):
    biases = []
    for more in ((), (*validation(corpus), "--validation.freq=1")):

        class Trainer(Biases):
            biases: ClassVar = []

        folder = f"--job.dump_folder={tmp_path / str(len(more))}"
        train(*QWEN3, *ON, *STRONG_BIAS, *more, folder, trainer_class=Trainer)
        biases.append(Trainer.biases)
    assert biases[0] == biases[1]
    assert biases[0][0] != [[0.0] * EXPERTS] * LAYERS


def test_metrics_are_of_latents(train):
    lines = train(*QWEN3, *ON)
    assert AUXILIARY_LOSS not in lines[0]
    choices = B * L * TOP_K
    for line in lines:
        shares = [line[f"{LARGEST}/layer_{layer}"] for layer in range(LAYERS)]
        assert line[LARGEST] == max(shares)
        counts = [share / 100 * choices for share in shares]  # whole numbers, also of latents
        assert counts == pytest.approx([round(count) for count in counts], abs=1e-6)
        assert 100 / EXPERTS <= max(shares) <= 100 / TOP_K


def test_metrics_of_uneven_experts():
    counts = torch.tensor([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    values = expert_metrics([1, 3], counts)
    assert values["experts/largest_share(%)/layer_1"] == 25
    assert values["experts/largest_share(%)"] == 100
    assert values["experts/smallest_share(%)"] == 0
    assert values["experts/entropy/layer_1"] == pytest.approx(1)
    assert values["experts/entropy"] == values["experts/entropy/layer_3"] == 0
    assert values["experts/dead"] == values["experts/dead/layer_3"] == 3
    assert values["experts/dead/layer_1"] == 0


def test_metrics_of_one_expert():
    assert expert_metrics([0], torch.ones(1, 1))["experts/largest_share(%)"] == 100


def test_sigmoid_scores_and_shared_experts(train, monkeypatch):
    """DeepSeek V3, whose first layer is dense."""
    moe_args = dataclasses.replace(deepseekv3_args["debugmodel"].moe_args, use_grouped_mm=False)
    flavor = dataclasses.replace(
        deepseekv3_args["debugmodel"], vocab_size=1024, n_layers=2, moe_args=moe_args
    )
    monkeypatch.setitem(deepseekv3_args, "tiny", flavor)
    lines = train(
        "--model.name=deepseek_v3", "--model.flavor=tiny", *ON, *AUXILIARY, "--training.steps=4"
    )
    assert all(1 <= line[AUXILIARY_LOSS] < 1.5 for line in lines)
    assert f"{LARGEST}/layer_0" not in lines[0]
    assert f"{LARGEST}/layer_1" in lines[0]


def test_gradients_of_both_losses_are_added_up_in_float32(train):
    """In bfloat16 the auxiliary loss's, which is smaller, would be rounded away."""
    dtypes = set()

    class Trainer(SuperpositionTrainer):
        def build(self, job_config):
            super().build(job_config)
            for layer in self.model_parts[0].layers.values():
                for first in (True, False):  # before the package's own hook, and after it
                    layer.moe.router.gate.register_forward_hook(
                        lambda module, args, logits, first=first: dtypes.add((first, logits.dtype)),
                        prepend=first,
                    )

    half = "--training.mixed_precision_param=bfloat16"
    train(*QWEN3, *ON, *AUXILIARY, half, "--training.steps=4", trainer_class=Trainer)
    assert dtypes == {(True, torch.bfloat16), (False, torch.float32)}


def test_a_router_bias_does_not_go_unnoticed_at_a_resume(train, tmp_path):
    """It would route tokens for ever, and no model with it can be exported."""
    folder = f"--job.dump_folder={tmp_path / 'run'}"
    job = (*QWEN3, *ON, *SAVE, folder)
    train(*job, *BIAS, "--training.steps=4")
    with pytest.raises(ContradictionError, match=r"load_balance.method = 'without a bias'.*'bias'"):
        train(*job, *AUXILIARY)
    shutil.rmtree(tmp_path / "run")
    train(*job, "--load_balance.method=none", "--training.steps=4")
    lines = train(*job, *AUXILIARY)  # which has no state
    assert lines[-1]["step"] == STEPS
    assert AUXILIARY_LOSS in lines[-1]
