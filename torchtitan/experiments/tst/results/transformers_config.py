"""The config of a model's class in transformers, from the model args of TorchTitan."""

from collections.abc import Callable
from typing import Any

import torch
from torchtitan.config import JobConfig
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs

from ..errors import UserError


class ExportError(UserError, RuntimeError):
    """A model that its class in transformers cannot represent; the message says why."""


def check_name(name: str) -> None:
    """Check that models of this name can be exported.

    Raises:
        ExportError: if not.
    """
    if name not in _CONFIGS:
        raise ExportError(f"model.name = {name!r}: must be {' or '.join(_CONFIGS)} to be exported")


def config_of(
    job_config: JobConfig, model_args: Any, state: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Return the content of ``config.json``, without the special tokens.

    Args:
        job_config: config of the run: name of the model (see :func:`check_name`), sequence length
            and ``checkpoint.export_dtype``.
        model_args: model args of the run.
        state: state dict of the model, on any device.

    Raises:
        ExportError: if the model's class in transformers cannot represent the model.
    """
    return _CONFIGS[job_config.model.name](model_args, state) | {
        "vocab_size": model_args.vocab_size,
        "hidden_size": model_args.dim,
        "num_hidden_layers": model_args.n_layers,
        "num_attention_heads": model_args.n_heads,
        "num_key_value_heads": model_args.n_kv_heads or model_args.n_heads,
        "rms_norm_eps": model_args.norm_eps,
        "rope_theta": float(model_args.rope_theta),
        "max_position_embeddings": job_config.training.seq_len,
        "attention_bias": False,
        "hidden_act": "silu",
        "dtype": job_config.checkpoint.export_dtype,
    }


def _llama3(args: TransformerModelArgs, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    scaling = args.rope_scaling_args  # upstream always applies it
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": len(state["layers.0.feed_forward.w1.weight"]),
        "head_dim": args.dim // args.n_heads,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling.scaling_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
    }


def _qwen3(args: Qwen3ModelArgs, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": args.hidden_dim,
        "head_dim": args.head_dim,
        "tie_word_embeddings": args.enable_weight_tying,
    }
    if not args.qk_norm:
        raise ExportError(
            "qk_norm = false: must be true to be exported, because Qwen3 in transformers has it"
        )
    if not args.moe_enabled:
        return config
    moe = args.moe_args
    for key, value in (
        ("score_func", "softmax"),
        ("score_before_experts", False),
        ("route_scale", 1.0),
        ("num_expert_groups", None),
        ("num_shared_experts", 0),
        ("gate_bias", False),
    ):
        if getattr(moe, key) != value:
            raise ExportError(
                f"moe_args.{key} = {getattr(moe, key)!r}: must be {value!r} to be exported: "
                "Qwen3MoeForCausalLM has no other"
            )
    return config | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": args.moe_inter_dim,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.route_norm,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


_CONFIGS: dict[str, Callable[[Any, dict[str, torch.Tensor]], dict[str, Any]]] = {
    "llama3": _llama3,
    "qwen3": _qwen3,
}
