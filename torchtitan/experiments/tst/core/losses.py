"""Losses over bags of targets (paper, Section 3.3, Appendices C and D).

With logits z at one position, lse = logsumexp(z) and weights w_i over the s offsets of the bag,

    sum_i w_i * CE(z, y_i) = (sum_i w_i) * lse - sum_i w_i * z[y_i]

so the multi-hot cross-entropy reads the logits once for the whole bag, and costs about as much as
one cross-entropy. The variants "mce_alt", "bce" and "hinge" see the bag as a set: a token that
occurs twice counts once, and no weighting applies.

A loss over several batches or ranks is one mean over all of them. To compute it from sums:

1. Count the targets of every part (:meth:`BagLoss.counts`), and sum the counts.
2. Turn the total into coefficients (:meth:`BagLoss.coefficients`).
3. Sum :meth:`BagLoss.sum` over the parts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed import _functional_collectives as funcol

from .bags import IGNORE_INDEX
from .vocabulary import Logits, ShardedLogits, localize

# The fit of Appendix D to the mutual information of token pairs at distance d: C0 + a * d**k
_FITTED_C0, _FITTED_A, _FITTED_K = 3.63, 1.35, -1.25

# Logits in a block of the eager cross-entropy. In float32 a block fits into a CPU core's cache
# (2 MiB). On an accelerator it is large enough to keep it busy (256 MiB).
_BLOCK_OF_CPU, _BLOCK_OF_ACCELERATOR = 2**19, 2**26

_WEIGHT_OF_OFFSET: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": torch.ones_like,
    "power_law": torch.reciprocal,
    "exponential": lambda i: (-i).exp(),
    "first_token": lambda i: (i == 1).to(i),
    "fitted": lambda i: _FITTED_C0 + _FITTED_A * i**_FITTED_K,
}
WEIGHTINGS = tuple(_WEIGHT_OF_OFFSET)


def offset_weights(
    weighting: str, bag_size: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return the weights w_1..w_s of the offsets in a bag, float64 (s,), not normalized."""
    offsets = torch.arange(1, bag_size + 1, dtype=torch.float64, device=device)
    return _WEIGHT_OF_OFFSET[weighting](offsets)


class _MultiHotCrossEntropy(torch.autograd.Function):
    """The sum over positions n and offsets i of w_i * CE(z_n, y_ni), without labels of -100.

    In eager mode, forward and backward each read the logits once. They use torch's softmax kernels
    on blocks that stay in a cache. Compiled, each is one fused loop, and backward reuses the
    log-sum-exp of forward.
    """

    @staticmethod
    def forward(ctx, logits, labels, weights, overwrite):
        # logits (N, V), labels (N, s), weights (s,)
        dtype = weights.dtype
        w = weights * (labels != IGNORE_INDEX)  # (N, s)
        index = labels.clamp_min(0)
        if torch.compiler.is_compiling():
            lse = logits.to(dtype).logsumexp(-1, keepdim=True)  # (N, 1)
            log_p = logits.gather(-1, index).to(dtype) - lse  # (N, s)
        else:
            lse = None
            blocks = _softmax_blocks(torch.log_softmax, dtype, logits, index)
            log_p = torch.cat([log_q.gather(-1, y) for log_q, y in blocks])
        ctx.save_for_backward(logits, lse, w, index)
        ctx.overwrite = overwrite
        return -(w * log_p).sum()

    @staticmethod
    def backward(ctx, grad_output):
        logits, lse, w, index = ctx.saved_tensors
        w = w * grad_output
        total = w.sum(-1, keepdim=True)
        # d/dz = (sum_i w_i) * softmax(z) - sum_i w_i * onehot(y_i)
        if torch.compiler.is_compiling():
            return _compiled_gradient(logits, lse, total, index, w), None, None, None
        grad = logits if ctx.overwrite else torch.empty_like(logits)
        for p, *rows in _softmax_blocks(torch.softmax, w.dtype, logits, grad, total, index, w):
            _write_gradient(p, *rows)
        return grad, None, None, None


class _ShardedCrossEntropy(torch.autograd.Function):
    """The multi-hot cross-entropy of logits that are sharded over the vocabulary.

    Each rank has a part of the vocabulary; the result is that of the whole. Ranks exchange three
    numbers for each position, in two reductions, whatever the bag size. An ordinary sharded
    cross-entropy exchanges as many, in three reductions.
    """

    @staticmethod
    def forward(ctx, logits, labels, weights, overwrite, shard):
        # logits (N, v), labels (N, s), weights (s,)
        dtype, group = weights.dtype, (shard.mesh, 0)
        w = weights * (labels != IGNORE_INDEX)  # (N, s)
        index, here = shard.find(labels)
        at_labels = w * here
        highest = funcol.all_reduce(logits.amax(-1, keepdim=True).to(dtype), "max", group)  # (N, 1)
        sums = torch.cat([e.sum(-1) for (e,) in _exp_blocks(logits, highest)])  # (N,)
        picked = (at_labels * (logits.gather(-1, index).to(dtype) - highest)).sum(-1)  # (N,)
        sums, picked = funcol.all_reduce(torch.stack([sums, picked]), "sum", group).unbind()
        log_sums = sums.log()
        ctx.save_for_backward(logits, highest + log_sums[:, None], w, at_labels, index)
        ctx.overwrite = overwrite
        return (w.sum(-1) * log_sums - picked).sum()

    @staticmethod
    def backward(ctx, grad_output):
        logits, lse, w, at_labels, index = ctx.saved_tensors
        total = w.sum(-1, keepdim=True) * grad_output
        at_labels = at_labels * grad_output
        if torch.compiler.is_compiling():
            grad = _compiled_gradient(logits, lse, total, index, at_labels)
            return grad, None, None, None, None
        grad = logits if ctx.overwrite else torch.empty_like(logits)
        for p, *rows in _exp_blocks(logits, lse, grad, total, index, at_labels):
            _write_gradient(p, *rows)
        return grad, None, None, None, None


def _compiled_gradient(logits, lse, total, labels, weights):
    """Return total (n, 1) * exp(logits - lse), minus weights (n, s) at labels (n, s).

    Values at labels are computed separately, so that one loop writes the rest without a float32
    copy.
    """
    grad = ((logits - lse).exp() * total).to(logits.dtype)
    p = (logits.gather(-1, labels) - lse).exp()
    at_labels = total * p - _summed_by_label(weights, labels)
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    return grad.index_put((rows, labels), at_labels.to(grad.dtype))


def _write_gradient(probabilities, grad, total, labels, weights):
    """Write total (n, 1) * probabilities, minus weights (n, s) at labels (n, s), to grad (n, V).

    ``probabilities`` may be overwritten.
    """
    write = _write_in_cache if grad.is_cpu else _write_in_one_pass
    write(probabilities, grad, total, labels, weights)


def _write_in_cache(probabilities, grad, total, labels, weights):
    """Write the gradient in several passes, for probabilities that are in a CPU cache."""
    grad.copy_(probabilities.mul_(total).scatter_add_(-1, labels, -weights))


def _write_in_one_pass(probabilities, grad, total, labels, weights):
    """Write the gradient in one pass, where a pass over memory costs more than the arithmetic."""
    at_labels = total * probabilities.gather(-1, labels) - _summed_by_label(weights, labels)
    torch.mul(probabilities, total, out=grad)
    grad.scatter_(-1, labels, at_labels.to(grad.dtype))


def _summed_by_label(weights, labels):
    """Return for each label of a bag the sum of the weights of all equal labels, (N, s).

    Equal labels get equal values, so a GPU may write them to the gradient in any order. With
    scatter_add_ the order would matter, because it adds the weights.
    """
    same = labels[:, :, None] == labels[:, None, :]  # (N, s, s)
    return (same * weights[:, None, :]).sum(-1)


def _softmax_blocks(softmax, dtype, logits, *others):
    """Yield ``softmax`` of blocks of rows of logits (N, V), with the same rows of others (N, ...).

    ``softmax`` is torch.softmax or torch.log_softmax. You may overwrite a block. It is valid until
    the next one.
    """
    memory = _memory_of_block(logits, dtype, 2) if logits.is_cpu else None
    for z, *rows in _blocks(logits, *others):
        if memory is None:
            yield softmax(z, -1, dtype=dtype), *rows
        else:
            exact, result = memory[:, : len(z)]
            yield softmax(exact.copy_(z), -1, out=result), *rows


def _exp_blocks(logits, shift, *others):
    """Yield exp(logits - shift) of blocks of rows of logits (N, V) and shift (N, 1).

    The rest is as in :func:`_softmax_blocks`.
    """
    if torch.compiler.is_compiling():
        return [((logits - shift).exp(), *others)]
    (memory,) = _memory_of_block(logits, shift.dtype, 1)
    return (
        (torch.sub(z, m, out=memory[: len(z)]).exp_(), *rows)
        for z, m, *rows in _blocks(logits, shift, *others)
    )


def _memory_of_block(logits, dtype, count):
    """Allocate memory (count, n, V) that all blocks use in turn.

    On a CPU, memory allocated for each block may be returned to the system each time. To get it
    again takes up to four times as long as the arithmetic.
    """
    rows = min(_rows_of_block(logits), len(logits))
    return logits.new_empty(count, rows, logits.shape[-1], dtype=dtype)


def _blocks(logits, *others):
    """Split the rows of logits (N, V) and of others (N, ...) into blocks."""
    rows = _rows_of_block(logits)
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


def _rows_of_block(logits):
    block = _BLOCK_OF_CPU if logits.is_cpu else _BLOCK_OF_ACCELERATOR
    return max(1, block // logits.shape[-1])


def _mce_alt(logits, labels, coefficients):
    """Sum -log of each bag's total probability: lse(z) - lse(z over the bag)."""
    members = _distinct(labels)
    empty = ~members.any(-1)
    picked = logits.at(labels).masked_fill(~members, -torch.inf)
    # An empty bag would give -inf - -inf. Its loss and gradient are 0.
    bag = picked.masked_fill(empty[:, None], 0.0).logsumexp(-1)
    return coefficients * (logits.logsumexp() - bag).masked_fill(empty, 0.0).sum()


def _bce(logits, labels, coefficients):
    """Sum binary cross-entropies over the vocabulary: softplus(z_v) - [v in bag] * z_v."""
    return _one_vs_rest(logits, labels, coefficients, F.softplus, torch.neg)


def _hinge(logits, labels, coefficients):
    """Sum hinge losses over the vocabulary, with labels t = +-1: max(0, 1 - t_v * z_v)."""
    return _one_vs_rest(
        logits,
        labels,
        coefficients,
        lambda z: (1 + z).relu(),
        lambda z: (1 - z).relu() - (1 + z).relu(),
    )


def _one_vs_rest(logits, labels, coefficients, absent, present_minus_absent):
    """Sum a binary loss over the vocabulary: ``absent`` of all logits, corrected at the labels."""
    members = _distinct(labels)
    bag = (present_minus_absent(logits.at(labels)) * members).sum(-1)
    return coefficients * ((logits.total(absent) + bag) * members.any(-1)).sum()


_SUMS_OF_SETS = {"mce_alt": _mce_alt, "bce": _bce, "hinge": _hinge}
LOSSES = ("mce", *_SUMS_OF_SETS)


@dataclass(frozen=True)
class BagLoss:
    """The loss of logits (..., V) for bags of targets (..., s).

    Attributes:
        loss: "mce", multi-hot cross-entropy: sum_i(w_i * CE_i) / sum_i(w_i), where CE_i is the
            mean cross-entropy over the valid targets at offset i (Appendix A). Or a variant of
            Appendix C, which is a mean over the bags: "mce_alt", "bce" or "hinge".
        weighting: the w_i of "mce", one of ``WEIGHTINGS`` (Appendix D).
        overwrite_logits: let backward() write the gradient of "mce" into the memory of the logits.
            Set it only if nothing reads the logits after backward. It has no effect in compiled
            code.
    """

    loss: str = "mce"
    weighting: str = "uniform"
    overwrite_logits: bool = False

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of this batch, a scalar."""
        return self.sum(logits, labels, self.coefficients(self.counts(labels)))

    def counts(self, labels: torch.Tensor) -> torch.Tensor:
        """Count the targets that the mean divides by.

        Returns:
            An int64 tensor: the valid targets at each offset, (s,), for "mce"; the bags with any
            valid target, (1,), for the variants.
        """
        valid = (labels != IGNORE_INDEX).flatten(0, -2)  # (N, s)
        return valid.sum(0) if self.loss == "mce" else valid.any(-1).sum(0, keepdim=True)

    def coefficients(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the factors that turn :meth:`sum` into the mean, float64, shaped like ``counts``.

        The mean skips an offset without a valid target, and its weight.
        """
        # This also fits the single count of the variants: their weighting is uniform.
        weights = offset_weights(self.weighting, counts.numel(), counts.device) * (counts > 0)
        return weights / (weights.sum() * counts).clamp_min(torch.finfo(torch.float64).tiny)

    def sum(
        self, logits: torch.Tensor, labels: torch.Tensor, coefficients: torch.Tensor
    ) -> torch.Tensor:
        """Return the batch's part of the mean: the sum of each term times its coefficient.

        The loss of bfloat16 and float16 logits is computed in float32. Logits may be a DTensor
        sharded over the vocabulary (loss parallel), and stay sharded. The result is a plain tensor,
        the same on all ranks of the mesh.
        """
        logits, shard = localize(logits)
        logits, labels = logits.flatten(0, -2), labels.flatten(0, -2)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        coefficients = coefficients.to(logits.device, dtype)
        if self.loss == "mce":
            args = (logits, labels, coefficients, self.overwrite_logits)
            if shard:
                return _ShardedCrossEntropy.apply(*args, shard)
            return _MultiHotCrossEntropy.apply(*args)
        logits = logits.to(dtype)
        z = ShardedLogits(logits, shard) if shard else Logits(logits)
        return _SUMS_OF_SETS[self.loss](z, labels, coefficients).squeeze()


def _distinct(labels: torch.Tensor) -> torch.Tensor:
    """Return a mask (N, s) of the valid labels that do not repeat an earlier label of the bag."""
    same = labels[:, :, None] == labels[:, None, :]  # (N, s, s)
    return (labels != IGNORE_INDEX) & ~same.tril(-1).any(-1)
