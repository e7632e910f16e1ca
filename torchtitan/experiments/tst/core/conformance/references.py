"""What the suite compares with: slow, and as the paper writes it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .implementation import Batch

IGNORE_INDEX = -100
WEIGHTS: dict[str, Callable[[int], float]] = {"uniform": lambda i: 1, "power_law": lambda i: 1 / i}


def fold(inputs: torch.Tensor, labels: torch.Tensor, s: int) -> Batch:
    """Fold tokens and next tokens (B, L*s) into bags and targets (Appendix A)."""
    tail = labels.new_full((len(labels), s - 1), IGNORE_INDEX)
    targets = torch.cat([labels[:, s - 1 :], tail], 1)
    return inputs.unflatten(1, (-1, s)), targets.unflatten(1, (-1, s))


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Return the cross-entropy in float64 of logits (B, L, V) and labels (B, L)."""
    logits, labels = logits.double().flatten(0, 1), labels.to(logits.device).flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction=reduction)


def mce(logits: torch.Tensor, targets: torch.Tensor, weighting: str = "uniform") -> torch.Tensor:
    """Return the multi-hot cross-entropy, one offset after the other (Section 3.3, Appendix A)."""
    weights = [WEIGHTS[weighting](i + 1) for i in range(targets.shape[-1])]
    losses = [w * cross_entropy(logits, targets[..., i]) for i, w in enumerate(weights)]
    return torch.stack(losses).sum() / sum(weights)


def equal(value: float, expected: float, tolerance: float = 1e-5) -> bool:
    """Return whether a loss is as expected; the tolerance is relative for losses above 1."""
    return abs(value - expected) <= tolerance * max(1.0, abs(expected))


def number(value: float | torch.Tensor) -> float:
    """Return a loss as a number, whether it has a graph or not."""
    return float(torch.as_tensor(value).detach())
