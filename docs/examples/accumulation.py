"""Gradient accumulation and data parallelism: one mean over all micro-batches and ranks.

You need it if micro-batches or ranks have different numbers of valid targets, because of padding
or document masks. The mean of their means would then be another loss. If all of them have equally
many, as with full windows, you can divide each micro-batch's loss by the number of micro-batches.
"""

import torch
import torch.distributed as dist

# or from your copy: tst core copy FOLDER
from torchtitan.experiments.tst.core import BagLoss


def backward(model, micro_batches, bag_loss: BagLoss):
    """Add the gradients of a step, and return its loss, the same on all ranks.

    It works with any model that averages gradients over all ranks, such as DDP.

    Args:
        model: returns logits (B, L, V) for bags.
        micro_batches: this rank's list of bags and targets, both (B, L, s). For recovery,
            give tokens and next tokens, both (B, L, 1).
        bag_loss: the loss of superposition.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    counts = sum(bag_loss.counts(targets) for _, targets in micro_batches)  # (s,)
    if ranks > 1:
        dist.all_reduce(counts)
    coefficients = bag_loss.coefficients(counts)  # of the mean over all targets
    loss = torch.zeros((), device=counts.device)
    for bags, targets in micro_batches:
        part = bag_loss.sum(model(bags), targets, coefficients)
        (part * ranks).backward()  # DDP divides the sum over ranks by their number
        loss += part.detach()
    if ranks > 1:
        dist.all_reduce(loss)
    return loss
