"""Flavors added to upstream's models; importing this module adds them.

With upstream's own trainer: ``--experimental.custom_import torchtitan.experiments.tst.models``.
"""

import dataclasses

from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs, qwen3_args

# The model of train_configs/demo: 0.23M parameters, small enough to be over-trained in minutes on
# a laptop, as the paper's runs are over-trained in hours on a cluster.
llama3_args["demo"] = TransformerModelArgs(
    dim=64, n_layers=2, n_heads=4, vocab_size=1024, multiple_of=64
)

# Qwen3's small enough for CPU. Upstream's debugmodel_moe takes minutes a step there, and its
# debugmodel ties embedding and LM head, which torch 2.13 refuses to shard as upstream asks it to.
_QWEN3_TINY = Qwen3ModelArgs(
    vocab_size=2048,
    head_dim=32,
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=128,
)
qwen3_args["debugmodel_tiny"] = _QWEN3_TINY
qwen3_args["debugmodel_moe_tiny"] = dataclasses.replace(
    _QWEN3_TINY,
    moe_enabled=True,
    moe_inter_dim=64,
    moe_args=MoEArgs(
        num_experts=4,
        num_shared_experts=0,
        top_k=2,
        score_func="softmax",
        route_norm=True,
        score_before_experts=False,
        use_grouped_mm=False,
    ),
)
