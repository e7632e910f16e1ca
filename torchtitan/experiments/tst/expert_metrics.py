"""Metrics that show how the experts of a model share the tokens."""

import math
from collections.abc import Callable

import torch

from .core import load_balancing_loss

METRICS = "experts"  # first part of the names of these metrics
LARGEST, SMALLEST = f"{METRICS}/largest_share(%)", f"{METRICS}/smallest_share(%)"
ENTROPY, DEAD = f"{METRICS}/entropy", f"{METRICS}/dead"
AUXILIARY_LOSS = "loss_metrics/load_balance"


def balance_metrics(totals: torch.Tensor, auxiliary_loss: bool) -> dict[str, float]:
    """Return the metrics of a step: those of the shares, and the auxiliary loss.

    Args:
        totals: the two of :meth:`~.core.ExpertLoad.totals`, of all ranks, float64 (2, layers, E).
            A layer without experts has 0.
        auxiliary_loss: whether the step had an auxiliary loss.
    """
    counts, probabilities = totals
    layers = counts.sum(1).nonzero()[:, 0]  # those with experts
    values = expert_metrics(layers.tolist(), counts[layers])
    if auxiliary_loss and len(layers):
        losses = load_balancing_loss(counts[layers], probabilities[layers])
        values[AUXILIARY_LOSS] = losses.mean().item()
    return values


def expert_metrics(layers: list[int], counts: torch.Tensor) -> dict[str, float]:
    """Return how even the shares of the experts are, for each layer and for all layers.

    Shares are in % of the router's choices. Entropy is 1 if all shares are equal. ``dead`` counts
    experts without any token.

    Args:
        layers: numbers of the layers with experts.
        counts: how often the router chose each expert, float64 (layers, E).
    """
    if not layers:
        return {}
    shares = counts / counts.sum(1, keepdim=True)
    entropy = torch.special.entr(shares).sum(1) / math.log(max(2, counts.shape[1]))
    of_layers: dict[str, tuple[torch.Tensor, Callable[[list[float]], float]]] = {
        LARGEST: (100 * shares.amax(1), max),
        SMALLEST: (100 * shares.amin(1), min),
        ENTROPY: (entropy, min),
        DEAD: ((counts == 0).sum(1), sum),
    }
    values: dict[str, float] = {}
    for name, (by_layer, whole) in of_layers.items():
        numbers = by_layer.tolist()
        values[name] = whole(numbers)
        for layer, number in zip(layers, numbers, strict=True):
            values[f"{name}/layer_{layer}"] = number
    return values
