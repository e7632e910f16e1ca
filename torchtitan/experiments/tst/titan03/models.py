"""The models of TorchTitan 0.2.2's flavors, ours included, as configs of TorchTitan 0.3.

Shapes, RoPE, norms and the distribution of the first weights are those of 0.2.2. The modules and
their names in a checkpoint are those of 0.3. ``flavors.json`` has the model args of each flavor.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import (
    ComplexRoPE,
    CosSinRoPE,
    Embedding,
    Linear,
    RMSNorm,
    RoPE,
    compute_ffn_hidden_dim,
)
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.moe import GroupedExperts, MoE
from torchtitan.models.common.param_init import depth_scaled_std, skip_param_init
from torchtitan.models.llama3 import Llama3Model, parallelize_llama
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.qwen3 import Qwen3Model, parallelize_qwen3
from torchtitan.models.qwen3.model import Qwen3TransformerBlock
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec
from typing_extensions import override

from ..errors import ConfigError

FLAVORS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("flavors.json").read_text()
)

_Init = dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class _Parts:
    """The classes of a model of TorchTitan 0.3."""

    model: Any
    block: Any
    rope: Any
    parallelize: Callable[..., nn.Module]
    adapter: Any


_MODELS = {
    "llama3": _Parts(
        Llama3Model,
        Llama3TransformerBlock,
        ComplexRoPE,
        parallelize_llama,
        Llama3StateDictAdapter,
    ),
    "qwen3": _Parts(
        Qwen3Model,
        Qwen3TransformerBlock,
        CosSinRoPE,
        parallelize_qwen3,
        Qwen3StateDictAdapter,
    ),
}


class ExpertsInTurn(GroupedExperts):
    """Experts that are computed one after the other, in the dtype of their input.

    This is what ``use_grouped_mm = False`` of 0.2.2's model args does. 0.3's own experts compute in
    bfloat16 always.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        """The config of TorchTitan's experts."""

    @override
    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """Return the output (R, d) of each expert for its rows of the input (R, d)."""
        weights = (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in weights)
        counts = num_tokens_per_expert_E.tolist()
        routed = sum(counts)
        outputs = [
            F.linear(F.silu(F.linear(x, w1[i])) * F.linear(x, w3[i]), w2[i])
            for i, x in enumerate(x_RD[:routed].split(counts))
        ]
        return torch.cat([*outputs, x_RD.new_zeros(x_RD.shape[0] - routed, x_RD.shape[1])])


def args_of(name: str, flavor: str) -> dict[str, Any]:
    """Return the model args of a flavor, as plain values.

    Raises:
        ConfigError: if there is no such model or flavor.
    """
    if name not in FLAVORS:
        raise ConfigError("model.name", name, f"must be {' or '.join(FLAVORS)} on TorchTitan 0.3")
    if flavor not in FLAVORS[name]:
        raise ConfigError(
            "model.flavor", flavor, f"must be a flavor of {name}: {', '.join(FLAVORS[name])}"
        )
    return FLAVORS[name][flavor]["args"]


def model_spec(
    name: str,
    flavor: str,
    *,
    seq_len: int,
    expert_backend: str = "standard",
    bias_step: float | None = None,
) -> ModelSpec:
    """Return the model of a flavor.

    Args:
        name: "llama3" or "qwen3".
        flavor: name of the flavor with TorchTitan 0.2.2.
        seq_len: longest sequence in latents.
        expert_backend: communication of expert parallelism, "standard" or "deepep".
        bias_step: how far the bias of an expert moves in a step; None: experts are not balanced.

    Raises:
        ConfigError: if there is no such model or flavor.
    """
    args, parts = args_of(name, flavor), _MODELS[name]
    dim, vocabulary = args["dim"], args["vocab_size"]
    tied = args.get("enable_weight_tying", False)
    rope = _rope(args, parts.rope, seq_len)
    embedding = {"weight": skip_param_init if tied else nn.init.normal_}
    std = dim**-0.5
    head = {"weight": functools.partial(nn.init.trunc_normal_, std=std, a=-3 * std, b=3 * std)}
    model = parts.model.Config(
        dim=dim,
        vocab_size=vocabulary,
        enable_weight_tying=tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary, embedding_dim=dim, param_init=embedding
        ),
        norm=_norm(args, dim),
        lm_head=Linear.Config(in_features=dim, out_features=vocabulary, param_init=head),
        layers=[
            _layer(args, parts.block, rope, layer, expert_backend, bias_step)
            for layer in range(args["n_layers"])
        ],
    )
    return ModelSpec(
        name=name,
        flavor=flavor,
        model=model,
        parallelize_fn=parts.parallelize,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=register_moe_load_balancing_hook if bias_step else None,
        state_dict_adapter=parts.adapter,
    )


def _rope(args: dict[str, Any], cls: Any, seq_len: int) -> RoPE.Config:
    """Return RoPE; 0.3 refuses sequences longer than a model's own, and 0.2.2 only warns."""
    return cls.Config(
        dim=args.get("head_dim", args["dim"] // args["n_heads"]),
        max_seq_len=max(args["max_seq_len"], seq_len),
        theta=args["rope_theta"],
        **{"scaling": "llama", **args["rope_scaling_args"]} if "rope_scaling_args" in args else {},
    )


def _layer(
    args: dict[str, Any],
    block: Any,
    rope: RoPE.Config,
    layer: int,
    expert_backend: str,
    bias_step: float | None,
) -> Any:
    """Return the config of a layer, counted from 0."""
    dim, head_dim = args["dim"], args.get("head_dim")
    std = depth_scaled_std(0.02, layer if args["depth_init"] else args["n_layers"] - 1)
    attention = make_gqa_config(
        dim=dim,
        n_heads=args["n_heads"],
        n_kv_heads=args.get("n_kv_heads"),
        head_dim=head_dim,
        wqkv_param_init=_normal(0.02),
        wo_param_init=_normal(std),
        inner_attention=get_attention_config("varlen" if args["attn_type"] == "varlen" else "flex"),
        fuse_qkv=True,
        rope=rope,
        qk_norm=_norm(args, head_dim) if args.get("qk_norm") and head_dim else None,
    )
    norms = {"attention_norm": _norm(args, dim), "ffn_norm": _norm(args, dim)}
    if "moe_args" in args:
        moe = _experts(args, std, expert_backend, bias_step)
        return block.Config(attention=attention, moe=moe, **norms)
    hidden = args.get("hidden_dim") or compute_ffn_hidden_dim(
        dim, multiple_of=args["multiple_of"], ffn_dim_multiplier=args.get("ffn_dim_multiplier")
    )
    feed_forward = make_ffn_config(
        dim=dim, hidden_dim=hidden, w1_param_init=_normal(0.02), w2w3_param_init=_normal(std)
    )
    return block.Config(attention=attention, feed_forward=feed_forward, **norms)


def _experts(
    args: dict[str, Any], std: float, expert_backend: str, bias_step: float | None
) -> MoE.Config:
    """Return the mixture of experts of a layer; all flavors score the output of experts."""
    moe = args["moe_args"]
    assert not moe["score_before_experts"] and not moe["num_shared_experts"]  # as 0.3's Qwen 3
    routed = make_routed_experts_config(
        dim=args["dim"],
        hidden_dim=args["moe_inter_dim"],
        num_experts=moe["num_experts"],
        top_k=moe["top_k"],
        param_init={
            "w1_EFD": _normal(0.02)["weight"],
            "w2_EDF": _normal(std)["weight"],
            "w3_EFD": _normal(std)["weight"],
        },
        comm_backend=expert_backend,
    )
    if not moe["use_grouped_mm"]:
        inner = routed.inner_experts
        routed.inner_experts = ExpertsInTurn.Config(
            dim=inner.dim,
            hidden_dim=inner.hidden_dim,
            num_experts=inner.num_experts,
            param_init=inner.param_init,
        )
    router = make_router_config(
        dim=args["dim"],
        num_experts=moe["num_experts"],
        gate_param_init=_normal(std),
        top_k=moe["top_k"],
        score_func=moe["score_func"],
        route_norm=moe["route_norm"],
        route_scale=moe["route_scale"],
        bias=moe["gate_bias"],
    )
    # Without the hook that moves them, all biases stay 0. They are in a checkpoint of both engines.
    return make_moe_config(
        num_experts=moe["num_experts"],
        router=router,
        routed_experts=routed,
        load_balance_coeff=bias_step or moe["load_balance_coeff"],
    )


def _norm(args: dict[str, Any], dim: int) -> RMSNorm.Config:
    return RMSNorm.Config(
        normalized_shape=dim, eps=args["norm_eps"], param_init={"weight": nn.init.ones_}
    )


def _normal(std: float) -> _Init:
    return {"weight": functools.partial(nn.init.trunc_normal_, std=std), "bias": nn.init.zeros_}
