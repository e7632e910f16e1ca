"""The flavors that this package adds to TorchTitan's models."""

import dataclasses

from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs, qwen3_args

_LLAMA3 = TransformerModelArgs(vocab_size=128_256, rope_theta=500_000)

_QWEN3_EXPERTS = MoEArgs(
    num_experts=128,
    num_shared_experts=0,
    top_k=8,
    score_func="softmax",
    route_norm=True,
    score_before_experts=False,
)

# Small enough for a CPU. There a step of upstream's debugmodel_moe takes minutes. Upstream's
# debugmodel ties embedding and LM head, and torch 2.13 refuses to shard those as upstream asks.
_QWEN3_TINY = Qwen3ModelArgs(
    vocab_size=2048,
    head_dim=32,
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=128,
)

LLAMA3 = {
    # The model of train_configs/demo: 0.24M parameters. A laptop over-trains it in minutes, as the
    # paper's clusters over-train their models in hours.
    "demo": TransformerModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=1024, multiple_of=64),
    # A smaller model for scripts/replicate.py: 0.09M parameters. Two cores train dozens of runs in
    # some hours, each on 100 or more latents per parameter.
    "demo_small": TransformerModelArgs(
        dim=32, n_layers=2, n_heads=2, vocab_size=1024, multiple_of=32
    ),
    # The model of train_configs/replication_gpu.toml: 3.5M parameters, for minutes of one GPU.
    "replication_gpu": TransformerModelArgs(
        dim=192,
        n_layers=6,
        n_heads=3,
        n_kv_heads=1,
        vocab_size=4096,
        multiple_of=64,
        ffn_dim_multiplier=0.75,
    ),
    # The paper's dense models: the shapes of SmolLM2-135M, SmolLM2-360M and SmolLM3-3B in Llama 3's
    # code, with its vocabulary and untied embeddings. The paper does not give RoPE's theta, so this
    # is Llama 3's.
    "270M": dataclasses.replace(_LLAMA3, dim=576, n_layers=30, n_heads=9, n_kv_heads=3),
    "600M": dataclasses.replace(_LLAMA3, dim=960, n_layers=32, n_heads=15, n_kv_heads=5),
    "3B": dataclasses.replace(
        _LLAMA3, dim=2048, n_layers=36, n_heads=16, n_kv_heads=4, ffn_dim_multiplier=2.0
    ),
}

QWEN3 = {
    # The paper's mixture of experts belongs to the Qwen3 family. The paper does not give its shape,
    # so this is our reconstruction after Qwen3-30B-A3B: 10.10B parameters; a token uses 1.04B.
    "10B-A1B": Qwen3ModelArgs(
        dim=1024,
        n_layers=24,
        n_heads=16,
        n_kv_heads=4,
        moe_enabled=True,
        moe_inter_dim=1024,
        moe_args=_QWEN3_EXPERTS,
    ),
    # The model of train_configs/demo/moe.toml: 0.48M parameters, 0.26M active.
    "demo_moe": dataclasses.replace(
        _QWEN3_TINY,
        vocab_size=1024,
        moe_enabled=True,
        moe_inter_dim=96,
        moe_args=dataclasses.replace(_QWEN3_EXPERTS, num_experts=8, top_k=2, use_grouped_mm=False),
    ),
    "debugmodel_tiny": _QWEN3_TINY,
    "debugmodel_moe_tiny": dataclasses.replace(
        _QWEN3_TINY,
        moe_enabled=True,
        moe_inter_dim=64,
        moe_args=dataclasses.replace(_QWEN3_EXPERTS, num_experts=4, top_k=2, use_grouped_mm=False),
    ),
}


def register() -> None:
    """Add the flavors to TorchTitan's. Flavors that a user registered under their names stay."""
    for flavors, ours in ((llama3_args, LLAMA3), (qwen3_args, QWEN3)):
        flavors.update({name: args for name, args in ours.items() if name not in flavors})
