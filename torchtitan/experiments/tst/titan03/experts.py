"""Balance the experts of TorchTitan 0.3's models, and measure their shares of the tokens."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.moe import MoE
from torchtitan.tools.logging import logger

from ..config.sections import LoadBalance
from ..core import ExpertLoad
from ..core.load_balance import router_probabilities
from ..expert_metrics import balance_metrics
from ..upstream.autograd import in_backward

_LOADS: WeakValueDictionary[int, ExpertLoad] = WeakValueDictionary()  # by number, for the operator


class LoadBalancer:
    """Counts the tokens of the experts, and adds the gradient of the auxiliary loss.

    Args:
        section: the section ``load_balance``, with the method "auxiliary_loss".
        model_parts: the parallelized model, whose layers get hooks.
        layers: number of layers of the whole model.
        parallel_dims: the layout of the job.
        device: device of the model.
    """

    def __init__(
        self,
        section: LoadBalance,
        model_parts: Sequence[nn.Module],
        layers: int,
        parallel_dims: ParallelDims,
        device: torch.device,
    ):
        moes = {
            int(name): moe
            for part in model_parts
            for name, block in part.layers.named_children()  # type: ignore[union-attr, operator]
            if isinstance(moe := getattr(block, "moe", None), MoE)
        }
        experts = next(iter(moes.values())).router.num_experts
        meshes = ["loss"]
        if parallel_dims.ep_enabled:
            meshes.append("tp")  # its ranks share the tokens out to route them
        found = [parallel_dims.get_optional_mesh(name) for name in meshes]
        self._groups = [mesh.get_group() for mesh in found if mesh is not None]
        self._nothing = torch.zeros(experts, dtype=torch.int64, device=device)
        self.load = ExpertLoad(layers, experts, section.coefficient, self._all_reduce)
        _LOADS[id(self.load)] = self.load
        for layer, moe in moes.items():
            _watch(moe, layer, self.load)
        logger.info(f"Experts: {experts} per layer, load_balance.method = {section.method}")

    def begin_step(self, tokens: int) -> None:
        """Reset the counts for a new step.

        Args:
            tokens: tokens of the global batch that the transformer sees; latents in superposition.
        """
        self.load.begin_step(tokens)
        self.load.count(0, self._nothing)  # compiled code can add to a tensor, but not make it

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        for group in self._groups:
            dist.all_reduce(tensor, group=group)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the step so far. Call it on all ranks at once."""
        totals = self.load.totals()
        if totals is None:
            return {}
        both = torch.stack(totals)
        self._all_reduce(both)
        return balance_metrics(both.cpu(), auxiliary_loss=True)


def _watch(moe: MoE, layer: int, load: ExpertLoad) -> None:
    """Add hooks to a layer that count the router's choices and add the auxiliary loss."""
    number, score_func = id(load), moe.router.score_func

    def with_auxiliary_loss(module: nn.Module, args: tuple, logits: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():  # in validation
            return None
        # In float32, so that the gradients of both losses are summed in it.
        own = logits.float()
        if not isinstance(own, DTensor):
            return _AuxiliaryLoss.apply(own, number, layer, score_func)
        mesh, placements = own.device_mesh, own.placements
        own = own.to_local(grad_placements=placements)
        own = _AuxiliaryLoss.apply(own, number, layer, score_func)
        return DTensor.from_local(own, mesh, placements, run_check=False)

    def count(module: nn.Module, args: tuple) -> None:
        if not torch.is_grad_enabled():
            return
        # Activation checkpointing runs the layer again in backward; compiled code does not count
        # again by itself.
        if torch.compiler.is_compiling() or not in_backward():
            counts = args[3]
            load.count(layer, counts.to_local() if isinstance(counts, DTensor) else counts)

    moe.router.gate.register_forward_hook(with_auxiliary_loss)
    moe.routed_experts.register_forward_pre_hook(count)


class _AuxiliaryLoss(torch.autograd.Function):
    """The identity of logits (B, L, E), with a backward that adds the auxiliary loss's gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, load: int, layer: int, score_func: str
    ) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.load, ctx.layer, ctx.score_func = load, layer, score_func
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        return _with_gradient(grad, logits, ctx.load, ctx.layer, ctx.score_func), None, None, None


# An operator, because torch.compile must not look inside: it needs the counts of all layers and of
# all ranks. It takes the gradient, so that it stays in the backward graph.
@torch.library.custom_op("tst::with_gradient_of_auxiliary_loss", mutates_args=())
def _with_gradient(
    grad: torch.Tensor, logits: torch.Tensor, load: int, layer: int, score_func: str
) -> torch.Tensor:
    """Return the gradient of logits plus that of the auxiliary loss."""
    probabilities = router_probabilities(logits, score_func)  # type: ignore[arg-type]
    of_sums = _LOADS[load].gradient(layer, probabilities.flatten(0, -2).sum(0))
    # the chain rule through softmax, or through a sigmoid and the division by the sum
    of_logits = probabilities * (of_sums - (probabilities * of_sums).sum(-1, keepdim=True))
    if score_func == "sigmoid":
        of_logits = of_logits * (1 - torch.sigmoid(logits))
    return grad + of_logits


@_with_gradient.register_fake
def _(
    grad: torch.Tensor, logits: torch.Tensor, load: int, layer: int, score_func: str
) -> torch.Tensor:
    return torch.empty_like(grad)
