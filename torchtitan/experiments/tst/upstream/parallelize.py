"""Workarounds for bugs in TorchTitan 0.2.2's parallelisms.

Upstream's own function parallelizes a model. This module adds workarounds where the result differs
from that of one process, each with its number in upstream's issue tracker. The bugs have nothing to
do with bags: runs without superposition need the workarounds as much.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.attention import FlexAttentionWrapper, ScaledDotProductAttentionWrapper
from torchtitan.models.llama3.infra.parallelize import disable_fsdp_gradient_division
from torchtitan.models.moe.moe import MoE

from ..config.layout import compiles
from .replaced import replace

# methods of a stage: in torch before 2.13, and from 2.13 on
_SHAPE_INFERENCE = (
    "_shape_inference",
    "_forward_metadata_inference",
    "_backward_metadata_inference",
)
Parallelize = Callable[[nn.Module, ParallelDims, JobConfig], nn.Module]


def parallelize(
    upstream: Parallelize, model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Parallelize a model with upstream's function for it, and add the workarounds.

    With ``upstream`` bound, it is a ``TrainSpec.parallelize_fn``.
    """
    parallel: Any = upstream(model, parallel_dims, job_config)
    disable_fsdp_gradient_division(parallel)  # as upstream's own functions: losses are sums
    if averages_gradients(parallel):
        _add_up_over_replicas(parallel, parallel_dims.dp_replicate)
    mesh = parallel_dims.get_optional_mesh("tp")
    if mesh is None:
        return parallel
    compiled = compiles(job_config, "model")
    if compiled and parallel.tok_embeddings is not None:  # None in later pipeline stages
        parallel.tok_embeddings.register_forward_hook(lambda module, args, out: _waited_for(out))
    # each tensor-parallel rank that is lent to experts routes a part of the tokens
    lent = parallel_dims.ep_enabled and not parallel_dims.etp_enabled
    for module in parallel.modules():
        if isinstance(module, MoE):
            if compiled:
                module.register_forward_pre_hook(lambda module, args: (_waited_for(args[0]),))
            _complete_gradients(module, mesh, lent)
        if parallel_dims.cp_enabled and isinstance(
            module, ScaledDotProductAttentionWrapper | FlexAttentionWrapper
        ):
            module.register_forward_pre_hook(_take_own_heads, prepend=True)
    return parallel


def averages_gradients(model: nn.Module) -> bool:
    """Return whether a model is under DDP, which averages the gradients of the replicas."""
    return hasattr(model, "register_comm_hook")


def forget_shapes(schedule: Any) -> None:
    """Make a pipeline schedule infer the shapes of its stages anew in its next step."""
    for stage in _stages(schedule):
        stage.inputs_meta = stage._outputs_meta = None  # torch before 2.13 infers only once
    for name in vars(schedule):
        if name.endswith("_initialized"):
            setattr(schedule, name, False)


def around_shape_inference(
    schedule: Any, context: Callable[[], AbstractContextManager[None]]
) -> None:
    """Make a pipeline schedule enter a context when it runs the model only to infer shapes.

    Args:
        schedule: schedule of this rank's stages.
        context: returns a new context each time.
    """

    def in_context(infer: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(infer)
        def infer_in_context(*args: Any, **kwargs: Any) -> Any:
            with context():
                return infer(*args, **kwargs)

        return infer_in_context

    for stage in _stages(schedule):
        for name in _SHAPE_INFERENCE:
            if hasattr(stage, name):
                replace(stage, name, in_context(getattr(stage, name)))


def _stages(schedule: Any) -> list[Any]:
    return [schedule._stage] if hasattr(schedule, "_stage") else schedule._stages


def add_up_partial_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients that are partial on each rank, such as those of norms with sequence parallel.

    In torch 2.11, clipping skips partial gradients, and so clips only all other gradients.
    """
    if torch.__version__ >= "2.13":
        return
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(p.is_partial() for p in gradient.placements):
            whole = [Replicate() if p.is_partial() else p for p in gradient.placements]
            parameter.grad = gradient.redistribute(placements=whole)


def _add_up_over_replicas(model: nn.Module, replicas: int) -> None:
    """Undo DDP's mean of gradients that are parts of a sum (pytorch/torchtitan#2318).

    The gradient is scaled in backward. A sum instead of the mean would add the gradients of earlier
    micro-batches again.
    """
    model.register_forward_hook(lambda module, args, out: _ScaleGradient.apply(out, replicas))


def _waited_for(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor that a collective may still be writing.

    With torch 2.13, a compiled layer gives no gradient to such an input.
    """
    return tensor.clone()


def _complete_gradients(moe: Any, mesh: DeviceMesh, lent: bool) -> None:
    """Sum partial gradients of a MoE layer over tensor-parallel ranks (pytorch/torchtitan#2387).

    A rank computes its part of each expert, or, if ``lent`` to experts, its part of the tokens. In
    the first case its gradient of the router's scores is partial, unless the scores go through the
    experts, which sum it. In the second case its gradient of the tokens is partial, too.
    """
    if lent or not moe.score_before_experts:
        moe.router.gate.register_forward_hook(lambda module, args, out: _add_up_gradient(out, mesh))
    if not lent:
        return
    moe.register_forward_pre_hook(lambda module, args: (_add_up_gradient(args[0], mesh),))
    for whole in (moe.router, moe.shared_experts):  # here the gradients of tokens are complete
        if whole is not None:
            whole.register_forward_pre_hook(
                lambda module, args: (_ScaleGradient.apply(args[0], 1 / mesh.size()), *args[1:])
            )


def _add_up_gradient(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Return the same tensor; in backward, its gradient is summed over all ranks."""
    same = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return same.to_local(grad_placements=[Partial()])


class _ScaleGradient(torch.autograd.Function):
    """Returns the same tensor; in backward, multiplies its gradient by a factor."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def _take_own_heads(module: nn.Module, args: Any) -> Any:
    """Convert DTensors to local tensors: context parallelism needs those (pytorch/torchtitan#2446).

    Under tensor parallelism, Qwen 3 passes DTensors.
    """
    return tuple(arg.to_local() if isinstance(arg, DTensor) else arg for arg in args)
