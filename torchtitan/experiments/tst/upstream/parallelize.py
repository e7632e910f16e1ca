"""TorchTitan's parallelisms, where 0.2.2's do not give what one process gives.

A model is parallelized by upstream's own function; what is added here makes up for faults of that
version, each with its number in upstream's issue tracker. They have nothing to do with bags: runs
without superposition need it as much.
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
from torchtitan.models.moe.moe import MoE

from ..config.layout import compiles
from .replaced import replace

# of a stage: of torch before 2.13, and since
_SHAPE_INFERENCE = (
    "_shape_inference",
    "_forward_metadata_inference",
    "_backward_metadata_inference",
)
Parallelize = Callable[[nn.Module, ParallelDims, JobConfig], nn.Module]


def parallelize(
    upstream: Parallelize, model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """A ``TrainSpec.parallelize_fn``, given upstream's of the model."""
    parallel: Any = upstream(model, parallel_dims, job_config)
    if averages_gradients(parallel):
        _add_up_over_replicas(parallel, parallel_dims.dp_replicate)
    mesh = parallel_dims.get_optional_mesh("tp")
    if mesh is None:
        return parallel
    compiled = compiles(job_config, "model")
    if compiled and parallel.tok_embeddings is not None:  # None in later stages
        parallel.tok_embeddings.register_forward_hook(lambda module, args, out: _waited_for(out))
    # ranks of tensor parallelism that are lent to experts route a part of the tokens each
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
    """Return whether a model is under DDP, which takes the mean of the replicas' gradients."""
    return hasattr(model, "register_comm_hook")


def forget_shapes(schedule: Any) -> None:
    """Have a pipeline schedule infer the shapes at its stages anew, at its next step."""
    for stage in _stages(schedule):
        stage.inputs_meta = stage._outputs_meta = None  # of torch before 2.13, which infers once
    for name in vars(schedule):
        if name.endswith("_initialized"):
            setattr(schedule, name, False)


def around_shape_inference(
    schedule: Any, context: Callable[[], AbstractContextManager[None]]
) -> None:
    """Have a pipeline schedule enter a context where it goes through the model for shapes alone.

    Args:
        schedule: of this rank's stages.
        context: returns the context, anew each time.
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
    """Add up gradients that each rank has a part of, as norms have under sequence parallel.

    Clipping leaves those parts as they are with torch 2.11, and so clips all other gradients only.
    """
    if torch.__version__ >= "2.13":
        return
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(p.is_partial() for p in gradient.placements):
            whole = [Replicate() if p.is_partial() else p for p in gradient.placements]
            parameter.grad = gradient.redistribute(placements=whole)


def _add_up_over_replicas(model: nn.Module, replicas: int) -> None:
    """DDP takes the mean of gradients, where they are parts of a sum (pytorch/torchtitan#2318).

    It takes that of what micro-batches before have left, too, which a sum would add up again.
    """
    model.register_forward_hook(lambda module, args, out: _ScaleGradient.apply(out, replicas))


def _waited_for(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of what a collective may not be done with yet.

    With torch 2.13 a compiled layer gives its input no gradient while it is that.
    """
    return tensor.clone()


def _complete_gradients(moe: Any, mesh: DeviceMesh, lent: bool) -> None:
    """Add up over the tensor-parallel ranks what each has of a gradient (pytorch/torchtitan#2387).

    A rank goes through its part of each expert, or, ``lent`` to experts, through its part of the
    tokens. In the first case it has a part of the gradient of the router's scores, unless they go
    through the experts, which add up; in the second of the tokens', too.
    """
    if lent or not moe.score_before_experts:
        moe.router.gate.register_forward_hook(lambda module, args, out: _add_up_gradient(out, mesh))
    if not lent:
        return
    moe.register_forward_pre_hook(lambda module, args: (_add_up_gradient(args[0], mesh),))
    for whole in (moe.router, moe.shared_experts):  # their gradients of the tokens are complete
        if whole is not None:
            whole.register_forward_pre_hook(
                lambda module, args: (_ScaleGradient.apply(args[0], 1 / mesh.size()), *args[1:])
            )


def _add_up_gradient(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The same tensor; in backward its gradient becomes the sum of all ranks'."""
    same = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return same.to_local(grad_placements=[Partial()])


class _ScaleGradient(torch.autograd.Function):
    """The same tensor; in backward its gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def _take_own_heads(module: nn.Module, args: Any) -> Any:
    """Context parallelism wants plain tensors; Qwen 3 has DTensors (pytorch/torchtitan#2446)."""
    return tuple(arg.to_local() if isinstance(arg, DTensor) else arg for arg in args)
