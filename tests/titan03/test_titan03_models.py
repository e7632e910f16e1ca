"""The models of 0.2.2's flavors, as TorchTitan 0.3 builds them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.models.common.attention import FlexAttention, VarlenAttention

from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.titan03.models import FLAVORS, ExpertsInTurn, args_of, model_spec

ALL = [(name, flavor) for name, flavors in FLAVORS.items() for flavor in flavors]
TINY = [("llama3", "demo"), ("qwen3", "debugmodel_tiny"), ("qwen3", "demo_moe")]


def built(name, flavor, device="meta"):
    spec = model_spec(name, flavor, seq_len=64)
    with torch.device(device):
        return spec, spec.model.build()


@pytest.mark.parametrize(("name", "flavor"), ALL)
def test_a_model_has_as_many_parameters_as_with_022(name, flavor):
    _, model = built(name, flavor)
    assert sum(p.numel() for p in model.parameters()) == FLAVORS[name][flavor]["parameters"]


@pytest.mark.parametrize(("name", "flavor"), TINY)
def test_the_weights_of_hugging_face_are_there_and_back(name, flavor):
    spec, model = built(name, flavor, "cpu")
    model.init_weights()
    adapter = spec.state_dict_adapter(spec.model, None)
    state = model.state_dict()
    weights = adapter.to_hf(state)
    args = args_of(name, flavor)
    layers, heads = args["n_layers"], args["n_heads"]
    width = heads * args.get("head_dim", args["dim"] // heads)
    assert weights["model.embed_tokens.weight"].shape == (args["vocab_size"], args["dim"])
    for layer in range(layers):
        q = weights[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert q.shape == (width, args["dim"])
    again = adapter.from_hf(weights)
    kept = {key for key in state if "expert_bias" not in key}
    assert set(again) == kept
    assert all(torch.equal(again[key], state[key]) for key in kept)


@pytest.mark.parametrize(("name", "flavor"), TINY)
def test_the_first_weights_are_distributed_as_with_022(name, flavor):
    torch.manual_seed(0)
    _, model = built(name, flavor, "cpu")
    model.init_weights()
    args = args_of(name, flavor)
    assert model.tok_embeddings.weight.std().item() == pytest.approx(1, rel=0.02)
    assert model.lm_head.weight.abs().max().item() <= 3 * args["dim"] ** -0.5
    assert model.lm_head.weight.std().item() == pytest.approx(args["dim"] ** -0.5, rel=0.05)
    for layer in range(2):
        wo = model.layers[f"{layer}"].attention.wo.weight
        assert wo.std().item() == pytest.approx(0.02 / (2 * (layer + 1)) ** 0.5, rel=0.05)
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm)]
    assert {norm.eps for norm in norms} == {args["norm_eps"]}
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms)


def test_a_sequence_may_be_longer_than_the_flavor_says():
    for length, expected in ((64, 4096), (8192, 8192)):
        layer = model_spec("qwen3", "0.6B", seq_len=length).model.layers[0]
        assert layer.attention.rope.max_seq_len == expected


def test_rope_is_scaled_for_llama_only():
    llama = model_spec("llama3", "8B", seq_len=64).model.layers[0].attention.rope
    qwen = model_spec("qwen3", "8B", seq_len=64).model.layers[0].attention.rope
    assert (llama.scaling, llama.scaling_factor, llama.theta) == ("llama", 8.0, 500_000)
    assert (qwen.scaling, qwen.theta, qwen.dim) == ("none", 1_000_000, 128)


@pytest.mark.parametrize(
    ("flavor", "attention"),
    [("8B", FlexAttention), ("8B_flex", FlexAttention), ("8B_varlen", VarlenAttention)],
)
def test_attention(flavor, attention):
    layer = model_spec("llama3", flavor, seq_len=64).model.layers[0]
    assert isinstance(layer.attention.inner_attention, attention.Config)


def test_tied_weights():
    assert built("qwen3", "0.6B")[1].enable_weight_tying
    assert not built("qwen3", "8B")[1].enable_weight_tying


def test_experts_in_turn_compute_in_the_dtype_of_their_input():
    torch.manual_seed(0)
    experts = ExpertsInTurn.Config(dim=4, hidden_dim=6, num_experts=3).build()
    for weight in experts.parameters():
        nn.init.normal_(weight)
    x, counts = torch.randn(7, 4), torch.tensor([2, 0, 3])
    y = experts(x, counts)
    assert y.dtype == torch.float32 and not y[5:].any(), "rows of no expert"
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        w1, w2, w3 = (w[expert] for w in (experts.w1_EFD, experts.w2_EDF, experts.w3_EFD))
        torch.testing.assert_close(y[row], w2 @ (F.silu(w1 @ x[row]) * (w3 @ x[row])))


@pytest.mark.parametrize(
    ("name", "flavor", "message"),
    [
        ("gpt_oss", "20b", "model.name = 'gpt_oss': must be llama3 or qwen3 on TorchTitan 0.3"),
        ("llama3", "9B", "model.flavor = '9B': must be a flavor of llama3: debugmodel, "),
    ],
)
def test_unknown_models_are_refused(name, flavor, message):
    with pytest.raises(ConfigError) as error:
        model_spec(name, flavor, seq_len=64)
    assert str(error.value).startswith(message)
