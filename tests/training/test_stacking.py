"""What users stack on a run goes through both phases: quantized linears, another optimizer, tied
weights, experts with balanced load."""

import dataclasses
import shutil

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import nn
from torchtitan.models.qwen3 import Qwen3Model, qwen3_args

from jobs import SAVE_LAST, TST, B, L, S, column, load_full, superposition
from torchtitan.experiments.tst.core import BagEmbedding, LossHead
from torchtitan.experiments.tst.metrics_file import TRAINING_LOSS, read_metrics
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

BOUNDARY, STEPS = 2, 4
ON = (*superposition(S, BOUNDARY), f"--training.steps={STEPS}", "--optimizer.lr=3e-3")
PLUGIN = "--experimental.custom_import=stacking_plugin"
FLOAT8 = ("--model.converters=quantize.linear.float8", "--quantize.linear.float8.emulate")
KEEP_HEAD = "--quantize.linear.float8.filter_fqns=output"
MUON = (PLUGIN, "--model.name=llama3_muon")
BALANCED = (PLUGIN, "--model.name=qwen3_balanced", "--model.flavor=debugmodel_moe_tiny")


class KeptTrainer(SuperpositionTrainer):
    """The latest stays at hand after its run."""

    latest: SuperpositionTrainer

    def close(self):
        KeptTrainer.latest = self
        super().close()


@pytest.mark.parametrize(
    "head", [(), (KEEP_HEAD,), (KEEP_HEAD, "--lm_head.chunks=3")], ids=["float8", "kept", "chunked"]
)
@pytest.mark.parametrize(
    "recipe",
    [
        "none",  # upstream's own, tensorwise too, and the one that it emulates
        "tensorwise",
        pytest.param(
            "rowwise",
            marks=pytest.mark.skipif(
                torch.__version__ < (2, 13), reason="torch 2.11's float8 product on CPU has none"
            ),
        ),
    ],
)
@inductor_config.patch(emulate_precision_casts=False)  # upstream sets it for good with rowwise
def test_float8(finished, train, recipe, head):
    from torchao.float8.float8_linear import Float8Linear

    named = () if recipe == "none" else (f"--quantize.linear.float8.recipe_name={recipe}",)
    plain = column(finished(*ON).lines)
    quantized = column(train(*ON, *FLOAT8, *named, *head, trainer_class=KeptTrainer))
    model = KeptTrainer.latest.model_parts[0]
    linears = {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    output = linears.pop("output")
    assert set(linears.values()) == {Float8Linear}
    kept = LossHead if "--lm_head.chunks=3" in head else nn.Linear
    assert output is (kept if head else Float8Linear)
    assert type(model.tok_embeddings) is BagEmbedding
    assert quantized == pytest.approx(plain, rel=3e-3)
    assert all(a != pytest.approx(b, rel=1e-7) for a, b in zip(quantized, plain, strict=True))
    if len(head) > 1:
        whole = column(finished(*ON, *FLOAT8, *named, KEEP_HEAD).lines)
        assert quantized == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("stack", [FLOAT8, MUON, BALANCED], ids=["float8", "Muon", "MoE"])
def test_resume_at_the_boundary_is_exact(train, tmp_path, stack):
    lines = train(*ON, *SAVE_LAST, *stack)
    shutil.move(tmp_path / "run", tmp_path / "whole")
    boundary = f"checkpoint/step-{BOUNDARY}"
    shutil.copytree(tmp_path / "whole" / boundary, tmp_path / "run" / boundary)
    resumed = train(*ON, *SAVE_LAST, *stack)
    for key in ("step", "phase", TRAINING_LOSS, "grad_norm"):
        assert column(resumed, key) == column(lines, key)[BOUNDARY:]
    last = f"checkpoint/step-{STEPS}"
    expected, actual = (load_full(tmp_path / run / last) for run in ("whole", "run"))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_muon(finished, train, tmp_path):
    """Each optimizer has its part of the model, in the boundary checkpoint too."""
    both, adamw = column(train(*ON, *SAVE_LAST, *MUON)), column(finished(*ON).lines)
    assert both[0] == adamw[0]
    assert all(a != b for a, b in zip(both[1:], adamw[1:], strict=True))
    state = load_full(tmp_path / "run" / "checkpoint" / f"step-{BOUNDARY}")
    parameters = {name for name in state if not name.startswith("optimizer.")}
    hidden = {n for n in parameters if n.startswith("layers.") and state[n].ndim == 2}
    states = {"momentum_buffer": hidden, "exp_avg": parameters - hidden}
    assert all(states.values())
    for suffix, names in states.items():
        saved = {name for name in parameters if f"optimizer.state.{name}.{suffix}" in state}
        assert saved == names


@pytest.mark.slow
def test_muon_under_fsdp(train, launch, tmp_path):
    """Two ranks cross the boundary; one goes on from their checkpoint as they do themselves."""
    job = (*ON, *SAVE_LAST, *MUON, f"--training.global_batch_size={2 * B}")
    launch(TST, *job, f"--job.dump_folder={tmp_path / 'ranks'}", processes=2)
    boundary = f"checkpoint/step-{BOUNDARY}"
    shutil.copytree(tmp_path / "ranks" / boundary, tmp_path / "run" / boundary)
    resumed = column(train(*job))
    assert len(resumed) == STEPS - BOUNDARY
    # Muon's iteration is in bfloat16
    assert resumed == pytest.approx(column(read_metrics(tmp_path / "ranks"))[BOUNDARY:], rel=1e-3)


def test_a_step_that_is_not_finite_moves_neither_optimizer(train):
    """The fused one could leave it out alone; Muon cannot, so the host holds both back."""
    same, everything = {}, set()

    class Trainer(SuperpositionTrainer):
        def forward_backward_step(self, **kwargs):
            loss = super().forward_backward_step(**kwargs)
            if self.step == 2:
                self.model_parts[0].output.weight.grad[0, 0] = torch.inf
            return loss

        def train_step(self, data_iterator):
            before = {k: v.clone() for k, v in self.state().items()}
            super().train_step(data_iterator)
            after = self.state()
            same[self.step] = {k for k in before if torch.equal(before[k], after[k])}
            everything.update(after)

        def state(self):
            state = self.model_parts[0].state_dict() | self.optimizers.state_dict()
            return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}

    train(*ON, *MUON, "--resilience.max_skipped_steps=1", trainer_class=Trainer)
    assert same[2] == everything
    assert not same[1] and not same[3]


@pytest.fixture
def tied_flavor(monkeypatch):
    """Upstream's tied debugmodel in small: what it ties is the same."""
    tied = dataclasses.replace(qwen3_args["debugmodel_tiny"], enable_weight_tying=True)
    monkeypatch.setitem(qwen3_args, "debugmodel_tiny_tied", tied)
    return "debugmodel_tiny_tied"


def gradients_of_an_untied_copy(model, tokens, bag_size):
    """In plain torch: of tokens (B, bag_size*L + 1), those of embedding and of head.

    A bag of 1 is ordinary training.
    """
    untied = Qwen3Model(dataclasses.replace(model.model_args, enable_weight_tying=False))
    untied.load_state_dict(model.state_dict())
    embedding, untied.tok_embeddings = untied.tok_embeddings.weight, None
    bags = tokens[:, :-1].unflatten(1, (-1, bag_size))
    logits = untied(embedding[bags].mean(2))  # without an embedding it takes latents
    terms = []  # of each offset in the next bag; the last bag has a next one of one token
    for offset in range(bag_size):
        targets = tokens[:, bag_size + offset :: bag_size]
        z = logits[:, : targets.shape[1]]
        terms.append(F.cross_entropy(z.flatten(0, 1), targets.flatten()))
    torch.stack(terms).mean().backward()
    return embedding.grad, untied.output.weight.grad


@pytest.mark.parametrize("chunks", [1, 3])
def test_tied_weight_gets_the_gradients_of_both_uses(train, tied_flavor, chunks):
    steps = []

    class Trainer(SuperpositionTrainer):
        def __init__(self, config):
            super().__init__(config)
            self.optimizers.register_step_pre_hook(self.compare)

        def batch_generator(self, data_iterable):
            for input_dict, labels in super().batch_generator(data_iterable):
                self.tokens = torch.cat([input_dict["input"], labels[:, -1:]], 1)
                yield input_dict, labels

        def compare(self, *args):
            model = self.model_parts[0]
            weight = model.output.weight
            assert model.tok_embeddings.weight is weight
            assert [p is weight for p in self.optimizers.param_groups[0]["params"]].count(True) == 1
            s = S if self.step <= BOUNDARY else 1
            parts = gradients_of_an_untied_copy(model, self.tokens, s)
            norm = weight.grad.norm()
            torch.testing.assert_close(weight.grad, sum(parts), rtol=1e-4, atol=1e-5 * norm.item())
            assert all(part.norm() > 0.01 * norm for part in parts)  # neither is lost in the sum
            steps.append(self.step)

    train(
        *ON,
        "--model.name=qwen3",
        f"--model.flavor={tied_flavor}",
        f"--lm_head.chunks={chunks}",
        "--training.max_norm=1e9",  # not clipped
        trainer_class=Trainer,
    )
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize("scale", ["sequence", "batch"])
def test_experts_are_balanced_by_latents(train, scale):
    """What is routed is a latent, so that is what upstream's load balancing has to count."""
    biases = []

    class Trainer(SuperpositionTrainer):
        def train_step(self, data_iterator):
            self.before = [moe.expert_bias.clone() for moe in self.experts()]
            super().train_step(data_iterator)
            for moe, before, counts in zip(self.experts(), self.before, self.counts, strict=True):
                sign = (counts.mean() - counts).sign()
                moved = moe.expert_bias - before
                expected = moe.load_balance_coeff * (sign - sign.mean())
                torch.testing.assert_close(moved, expected, rtol=0, atol=1e-7)
                biases.append((self.step, moved.abs().max().item()))

        def forward_backward_step(self, **kwargs):
            loss = super().forward_backward_step(**kwargs)
            self.counts = [moe.tokens_per_expert.clone() for moe in self.experts()]
            assert {counts.sum().item() for counts in self.counts} == {B * L * 2}  # top_k of 2
            return loss

        def experts(self):
            return [layer.moe for layer in self.model_parts[0].layers.values()]

    lines = train(*ON, *BALANCED, f"--superposition.scale={scale}", trainer_class=Trainer)
    read = [line["n_tokens_seen"] for line in lines]
    assert read == [B * L * n for n in (S, 2 * S, 2 * S + 1, 2 * S + 2)]
    assert all(moved > 0 for _, moved in biases)
    assert [step for step, _ in biases] == [1, 1, 2, 2, 3, 3, 4, 4]  # of two layers
