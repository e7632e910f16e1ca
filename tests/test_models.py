"""The paper's models have the shapes that it prints, and the sizes in their names."""

import pytest
import torch
from torchtitan.models.llama3 import Transformer, llama3_args
from torchtitan.models.qwen3 import Qwen3Model, qwen3_args

VOCABULARY = 128_256


def on_meta(model_cls, args):
    with torch.device("meta"):
        return model_cls(args)


@pytest.mark.parametrize(
    ("flavor", "layers", "dim", "heads", "kv_heads", "ffn", "parameters"),
    [
        ("270M", 30, 576, 9, 3, 1536, 253_954_368),
        ("600M", 32, 960, 15, 5, 2560, 560_886_720),
        ("3B", 36, 2048, 16, 4, 11008, 3_337_766_912),
    ],
)
def test_dense_shapes(flavor, layers, dim, heads, kv_heads, ffn, parameters):
    model = on_meta(Transformer, llama3_args[flavor])
    assert len(model.layers) == layers
    block, head_dim = model.layers["0"], dim // heads
    assert block.attention.wq.weight.shape == (dim, dim)
    assert block.attention.wk.weight.shape == (kv_heads * head_dim, dim)
    assert block.feed_forward.w1.weight.shape == (ffn, dim)
    embeddings = (model.tok_embeddings.weight, model.output.weight)
    assert all(weight.shape == (VOCABULARY, dim) for weight in embeddings)
    assert embeddings[0] is not embeddings[1], "untied"
    of_a_layer = 2 * dim * dim + 2 * kv_heads * head_dim * dim + 3 * ffn * dim + 2 * dim
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == layers * of_a_layer + 2 * VOCABULARY * dim + dim == parameters


def test_mixture_of_experts_is_10b_of_which_1b_is_active():
    """Counted from the shape that docs/paper.md names."""
    args = qwen3_args["10B-A1B"]
    model = on_meta(Qwen3Model, args)
    layers, width, heads, kv_heads, head_dim, vocabulary = 24, 1024, 16, 4, 128, 151_936
    experts, used, of_an_expert = 128, 8, 3 * 1024 * 1024
    attention = 2 * width * heads * head_dim + 2 * width * kv_heads * head_dim + 2 * head_dim
    of_a_layer = attention + width * experts + 2 * width  # with router and norms, without experts
    outside = 2 * vocabulary * width + width
    total = outside + layers * (of_a_layer + experts * of_an_expert)
    active = outside + layers * (of_a_layer + used * of_an_expert)
    assert sum(parameter.numel() for parameter in model.parameters()) == total == 10_103_872_512
    assert active == 1_044_175_872
    assert (args.moe_args.num_experts, args.moe_args.top_k) == (experts, used)
    assert model.tok_embeddings.weight is not model.output.weight, "untied"
