"""Bag-of-token embedding (paper, Section 3.1)."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils import parametrize

from .vocabulary import VocabularyShard


def lost_if_replaced(module: nn.Module, *plain: type[nn.Module]) -> str:
    """Return what is lost if another module takes over only the weight of ``module``.

    Args:
        module: an embedding or an LM head.
        plain: classes with a forward that the other module takes over.

    Returns:
        "a parametrization", "a forward of its own" or "a forward hook"; "" if nothing is lost.
    """
    if parametrize.is_parametrized(module):
        return "a parametrization"
    own = "forward" in vars(module) or type(module).forward not in [cls.forward for cls in plain]
    if own:
        return "a forward of its own"
    return "a forward hook" if module._forward_hooks or module._forward_pre_hooks else ""


class BagEmbedding(nn.Embedding):
    """A token embedding that also accepts bags: for (B, L) ids it is an ordinary ``nn.Embedding``.

    For (B, L, s) ids it returns the mean of each bag's embeddings, (B, L, d), summed in float32. If
    the weight is sharded over ranks, each rank sums its part in float32, and the parts are summed
    in the dtype of the weight. Parameters and state dict are those of ``nn.Embedding``.
    """

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "BagEmbedding":
        """Wrap an embedding; the weight is shared, not copied (it may be tied to an LM head).

        Raises:
            ValueError: if the embedding has a forward of its own, a hook or a parametrization,
                which would be lost.
        """
        if lost := lost_if_replaced(embedding, nn.Embedding, BagEmbedding):
            raise ValueError(
                f"{type(embedding).__name__} has {lost}, which bags would not use; move what it "
                "adds behind the embedding, into the forward of the model"
            )
        bag_embedding = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            padding_idx=embedding.padding_idx,
            max_norm=embedding.max_norm,
            norm_type=embedding.norm_type,
            scale_grad_by_freq=embedding.scale_grad_by_freq,
            sparse=embedding.sparse,
            device="meta",
            dtype=embedding.weight.dtype,
        )
        bag_embedding.weight = embedding.weight
        return bag_embedding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (B, L, d) of token ids (B, L) or of bags (B, L, s)."""
        if input.ndim < 3:
            return super().forward(input)
        special = self.padding_idx is not None or self.max_norm or self.scale_grad_by_freq
        special = special or self.sparse
        shard = None if special else VocabularyShard.of(self.weight, 0)
        if shard:
            return _mean_of_shards(input, self.weight, shard)
        if isinstance(self.weight, DTensor) or special:
            # One lookup of all s tokens: a sum of s lookups fails on a sharded weight.
            embedded = super().forward(input)  # (B, L, s, d)
            return embedded.mean(dim=-2, dtype=torch.float32).to(embedded.dtype)
        return means(input, self.weight)


def means(bags: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the means of the bags' embeddings, (B, L, d), summed in float32.

    Args:
        bags: token ids (B, L, s).
        weight: weight of the embedding, (V, d).
    """
    rows = bags.flatten(0, -2)
    if bags.is_cpu and weight.dtype == torch.float32:
        mean = _MeanOnCPU.apply(rows, weight)
    else:
        mean = F.embedding_bag(rows, weight, mode="mean")
    # Not a view: FSDP2 warns about views, because a write into one would undo FSDP's hooks.
    return torch.ops.aten._unsafe_view(mean, [*bags.shape[:-1], mean.shape[-1]])


def partial_means(
    bags: torch.Tensor, entries: torch.Tensor, shard: VocabularyShard
) -> torch.Tensor:
    """Return this rank's part of the means, (B, L, d): their sum over the ranks is :func:`means`.

    Tensor parallelism then reduces (B, L, d), as for single tokens, and not (B, L, s, d).

    Args:
        bags: token ids (B, L, s), the same on all ranks.
        entries: this rank's part of the weight, (v, d).
        shard: this rank's part of the vocabulary.
    """
    index, here = shard.find(bags.flatten(0, -2))  # (N, s)
    total = F.embedding_bag(index, entries, mode="sum", per_sample_weights=here.to(entries.dtype))
    return (total / bags.shape[-1]).unflatten(0, bags.shape[:-1])


def _mean_of_shards(bags: torch.Tensor, weight: torch.Tensor, shard: VocabularyShard) -> DTensor:
    """Return the means as a ``Partial`` DTensor (B, L, d), of a weight (V, d) that is sharded."""
    if isinstance(bags, DTensor):
        bags = bags.to_local()
    assert isinstance(weight, DTensor)
    mean = partial_means(bags, weight.to_local(), shard)
    return DTensor.from_local(mean, shard.mesh, [Partial()], run_check=False)


class _MeanOnCPU(torch.autograd.Function):
    """``F.embedding_bag`` with a backward that takes half the time on CPU."""

    @staticmethod
    def forward(ctx, bags, weight):
        # bags (N, s), weight (V, d)
        ctx.save_for_backward(bags)
        ctx.shape = weight.shape
        return F.embedding_bag(bags, weight, mode="mean")

    @staticmethod
    def backward(ctx, grad_output):
        (bags,) = ctx.saved_tensors
        bag_size = bags.shape[1]
        grad = (grad_output / bag_size).repeat_interleave(bag_size, dim=0)  # (N*s, d)
        return None, grad.new_zeros(ctx.shape).index_add_(0, bags.flatten(), grad)
