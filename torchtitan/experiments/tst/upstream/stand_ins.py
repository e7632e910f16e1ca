"""Replacements for fake tensors that allocate what the GPU's kernels allocate.

The dry run's tensors are on the CPU and represent tensors on an accelerator. Functions that run
differently on CPU, need a GPU, or read values are replaced here.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import _disable_current_modes
from torchtitan.distributed import utils as dist_utils
from torchtitan.models import attention
from torchtitan.models.moe import kernels as moe_kernels
from torchtitan.models.moe import moe
from torchtitan.models.moe import utils as moe_utils

from ..core import embedding, losses
from .replaced import replaced

_HALF = (torch.bfloat16, torch.float16)  # the dtypes of the fused attention kernels
_BLOCK = 128  # positions in a block of flex attention's mask

TOKENIZER = SimpleNamespace(eos_id=0)  # attention within documents needs no more of a tokenizer


@contextlib.contextmanager
def stand_ins(model_args: Any) -> Iterator[None]:
    """Replace the functions in this context.

    Args:
        model_args: model args of the flavor; their module asks for the GPU's capability.
    """
    args_module = importlib.import_module(type(model_args).__module__)
    sdpa, flex = attention.ScaledDotProductAttentionWrapper, attention.FlexAttentionWrapper
    varlen = attention.VarlenAttentionWrapper
    propagator, shapes = ShardingPropagator, "_propagate_tensor_meta_non_cached"
    with contextlib.ExitStack() as patches:
        for patch in (
            replaced(torch.nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor),
            replaced(dist_utils, "dist_sum", lambda *_, **__: 1.0),
            replaced(sdpa, "forward", _sdpa),
            replaced(flex, "_compiled_flex_attn", staticmethod(_flex)),
            replaced(attention, "_compiled_create_block_mask", _block_mask),
            replaced(varlen, "forward", _varlen),
            replaced(torch, "histc", lambda ids, bins, **_: ids.new_empty(bins)),
            replaced(moe, "_run_experts_for_loop", moe._run_experts_grouped_mm),
            replaced(moe_utils, "generate_permute_indices", moe_kernels.generate_permute_indices),
            replaced(moe_kernels, "fill_indices_wrapper", _fill_indices),
            replaced(propagator, shapes, _unseen(getattr(propagator, shapes))),
            replaced(losses, "_BLOCK_OF_CPU", losses._BLOCK_OF_ACCELERATOR),
            replaced(losses, "_write_in_cache", losses._write_in_one_pass),
            replaced(embedding, "_MeanOnCPU", _MeanOnAccelerator),
        ):
            patches.enter_context(patch)
        if hasattr(args_module, "has_cuda_capability"):
            patches.enter_context(replaced(args_module, "has_cuda_capability", lambda *_: True))
        yield


def attention_masks(model_args: Any, model: Any) -> Any:
    """Return a ``get_attention_masks`` for the model that reads no values.

    Args:
        model_args: model args of the flavor.
        model: the model; its own method is returned if that reads no values.
    """
    if getattr(model_args, "attn_type", "sdpa") != "varlen":
        return model.get_attention_masks
    return _varlen_metadata


def _unseen(propagate: Callable[..., Any]) -> Callable[..., Any]:
    """Hide the tensors that DTensor uses to infer shapes from the memory tracker.

    They have the shapes of the whole model, and never exist in memory.
    """

    @functools.wraps(propagate)
    def propagate_unseen(*args: Any) -> Any:
        with _disable_current_modes():
            return propagate(*args)

    return propagate_unseen


def _fused(q: Any, k: Any, v: Any, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output (B, heads, L, head_dim) and log-sums (B, heads, L) of upstream's SDPA kernel.

    The kernel saves these two for backward, like those of flex and varlen attention.
    """
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (q, k, v))
    output, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    return output, sums.squeeze(-1)


def _sdpa(
    self: Any, q: Any, k: Any, v: Any, *, scale: Any = None, enable_gqa: bool = False, **kwargs: Any
) -> torch.Tensor:
    if q.dtype in _HALF or torch.is_autocast_enabled("cpu"):
        return _fused(q, k, v, scale)[0]
    if isinstance(q, DTensor):  # each rank has a part of the heads
        local = _sdpa(
            self, q.to_local(), k.to_local(), v.to_local(), scale=scale, enable_gqa=enable_gqa
        )
        return DTensor.from_local(local, q.device_mesh, q.placements, run_check=False)
    with sdpa_kernel(SDPBackend.MATH):  # as on GPUs, which have no fused kernel for float32
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )


def _flex(
    q: Any, k: Any, v: Any, *, scale: Any = None, return_lse: bool = False, **kwargs: Any
) -> Any:
    output, sums = _fused(q, k, v, scale)
    return (output, sums) if return_lse else output


def _varlen(self: Any, q: Any, k: Any, v: Any, masks: Any, scale: Any = None) -> torch.Tensor:
    """Return the attention of all sequences packed into one.

    Args:
        self: the module.
        q: queries (B, heads, L, head_dim).
        k: keys, of the same shape.
        v: values, of the same shape.
        masks: ignored.
        scale: scale of the scores.

    Returns:
        The output (B * L, heads, head_dim).
    """
    # (B, heads, L, head_dim) -> (1, heads, B * L, head_dim)
    q, k, v = (part.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for part in (q, k, v))
    output, _ = _fused(q, k, v, scale)
    return output[0].transpose(0, 1)


def _block_mask(
    mask_mod: Any, batch: int | None, heads: int | None, queries: int, keys: int, **kwargs: Any
) -> BlockMask:
    """Return what compiled ``create_block_mask`` returns; it creates no dense mask."""
    shape = (batch or 1, heads or 1, -(-queries // _BLOCK))
    return BlockMask.from_kv_blocks(
        torch.zeros(shape, dtype=torch.int32),
        torch.zeros(*shape, -(-keys // _BLOCK), dtype=torch.int32),
        mask_mod=mask_mod,
        seq_lengths=(queries, keys),
    )


def _varlen_metadata(
    input_batch: torch.Tensor, tokenizer: Any, extra_inputs: Any = None
) -> attention.VarlenMetadata:
    """Return the metadata as if each sequence were one document."""
    sequences, length = input_batch.shape
    begins = torch.zeros(sequences + 1, dtype=torch.int32)
    return attention.VarlenMetadata(begins, begins, length, length)


def _fill_indices(
    tokens_per_expert: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    experts_per_rank: int,
    num_ranks: int,
    max_len: int,
    **kwargs: Any,
) -> torch.Tensor:
    """Return a tensor like that of upstream's Triton kernel."""
    return tokens_per_expert.new_empty(max_len, dtype=torch.int32)


class _MeanOnAccelerator:
    @staticmethod
    def apply(bags: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(bags, weight, mode="mean")
