"""LM head and loss in one module, computed for one chunk of positions at a time.

The logits of a whole batch are the largest tensor of a model with a large vocabulary. With chunks
they never exist all at once.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .embedding import lost_if_replaced

SummedLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LossHead(nn.Linear):
    """An LM head that returns the loss instead of the logits if it has labels.

    Without labels it is an ordinary ``nn.Linear``. Parameters and state dict are those of
    ``nn.Linear``. The whole loss is one forward of this module, so FSDP gathers the weight once,
    whatever the number of chunks.

    Attributes:
        chunks: number of chunks that the positions of a batch are split into.
    """

    chunks: int = 1
    _expected: tuple[torch.Tensor, SummedLoss] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, chunks: int) -> "LossHead":
        """Wrap an LM head; the weight is shared, not copied (it may be tied to an embedding).

        Args:
            linear: the LM head.
            chunks: number of chunks that the positions of a batch are split into.

        Raises:
            ValueError: if the head has a bias, a forward of its own, a hook or a parametrization.
        """
        if linear.bias is not None:
            raise ValueError("an LM head with a bias cannot be chunked; use one without a bias")
        if lost := lost_if_replaced(linear, nn.Linear, LossHead):
            raise ValueError(f"{type(linear).__name__} has {lost}: no chunks of it")
        head = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            device="meta",
            dtype=linear.weight.dtype,
        )
        head.weight = linear.weight
        head.chunks = chunks
        return head

    def expect(self, labels: torch.Tensor, loss_fn: SummedLoss) -> None:
        """Make the next forward return the summed loss.

        Args:
            labels: token ids (B, L), or bags (B, L, s).
            loss_fn: returns the summed loss of logits (1, n, V) and labels (1, n) or (1, n, s). Its
                backward may overwrite the logits.
        """
        self._expected = (labels, loss_fn)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, L, V) of hidden states (B, L, d), or the loss, a scalar.

        If the weight is sharded over the vocabulary (tensor parallelism), ``input`` and the loss
        are DTensors with the same value on all ranks. The loss then has shape (1,), so that it can
        be sharded like logits.
        """
        expected, self._expected = self._expected, None
        if expected is None:
            return super().forward(input)
        labels, loss_fn = expected
        if not isinstance(self.weight, DTensor):
            return chunked_loss(input, self.weight, labels, loss_fn, self.chunks)
        mesh = self.weight.device_mesh
        assert isinstance(input, DTensor)
        # Each rank's gradient comes from its part of the vocabulary only.
        hidden = input.to_local(grad_placements=[Partial()])
        of_shards = functools.partial(_of_shards, loss_fn, mesh)
        loss = chunked_loss(hidden, self.weight.to_local(), labels, of_shards, self.chunks)
        return DTensor.from_local(loss[None], mesh, [Replicate()], run_check=False)


def _of_shards(
    loss_fn: SummedLoss, mesh: DeviceMesh, logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return ``loss_fn`` of logits (1, n, V), given this rank's part, (1, n, V / ranks)."""
    loss = loss_fn(DTensor.from_local(logits, mesh, [Shard(-1)], run_check=False), labels)
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_fn: SummedLoss,
    chunks: int,
) -> torch.Tensor:
    """Return ``loss_fn`` of the logits ``hidden @ weight.T``, computed one chunk at a time.

    If gradients are needed, forward computes them too. Otherwise backward would have to compute the
    logits again. There are as many matrix products as without chunks. The gradient of the weight is
    summed in the dtype of the products.

    Args:
        hidden: hidden states (B, L, d).
        weight: of the LM head, (V, d).
        labels: token ids (B, L), or bags (B, L, s).
        loss_fn: returns the summed loss of logits (1, n, V) and labels (1, n) or (1, n, s).
        chunks: number of chunks that the B*L positions are split into. All have the same size,
            except the last.
    """
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    hidden, labels = hidden.flatten(0, 1), labels.flatten(0, 1)
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(hidden, weight, labels, loss_fn, chunks)
    parts = zip(hidden.chunk(chunks), labels.chunk(chunks), strict=True)
    return torch.stack([loss_fn(F.linear(h, weight)[None], y[None]) for h, y in parts]).sum()


class _ChunkedLoss(torch.autograd.Function):
    """The loss of :func:`chunked_loss` with its gradients, which forward computes."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, loss_fn, chunks):
        # hidden (N, d), weight (V, d), labels (N,) or (N, s)
        losses: list[torch.Tensor] = []
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.empty_like(weight)
        parts = (tensor.chunk(chunks) for tensor in (hidden, labels, hidden_grad))
        for h, y, h_grad in zip(*parts, strict=True):
            logits = F.linear(h, weight).requires_grad_()  # (n, V)
            with torch.enable_grad():
                loss = loss_fn(logits[None], y[None])
            (grad,) = torch.autograd.grad(loss, logits)
            torch.mm(grad, weight, out=h_grad)
            weight_grad.addmm_(grad.T, h, beta=1 if losses else 0)
            losses.append(loss.detach())
            del logits, loss, grad  # free them before the next chunk's logits
        ctx.save_for_backward(hidden_grad, weight_grad)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, grad_output):
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad.mul_(grad_output), weight_grad.mul_(grad_output), None, None, None
