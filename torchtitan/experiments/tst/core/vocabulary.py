"""A vocabulary that tensor parallelism shards over ranks, for the embedding and the logits.

With loss parallel, each rank has the logits of its part of the vocabulary, and no rank ever has all
of them. The losses over sets read both kinds through :class:`Logits` and :class:`ShardedLogits`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from typing_extensions import override


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary that this rank has.

    Attributes:
        offset: token id of its first entry.
        entries: number of its entries.
        mesh: one-dimensional mesh that the vocabulary is sharded over.
    """

    offset: int
    entries: int
    mesh: DeviceMesh

    @classmethod
    def of(cls, tensor: torch.Tensor, dim: int) -> "VocabularyShard | None":
        """Return the shard of a tensor with the vocabulary in ``dim``; None if it is not sharded.

        None also if anything else than that dimension alone is sharded.
        """
        if not isinstance(tensor, DTensor):
            return None
        mesh, placements = tensor.device_mesh, tensor.placements
        if tuple(placements) != (Shard(dim % tensor.ndim),):
            return None
        return cls.of_rank(tensor.shape[dim], mesh)

    @classmethod
    def of_rank(cls, size: int, mesh: DeviceMesh) -> "VocabularyShard":
        """Return this rank's shard of a vocabulary of ``size`` entries, as ``torch.chunk`` cuts."""
        chunk = -(-size // mesh.size())
        offset = min(chunk * mesh.get_local_rank(), size)
        return cls(offset, min(chunk, size - offset), mesh)

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find token ids in this part of the vocabulary.

        Args:
            ids: token ids (...).

        Returns:
            The index of each id in this part, and a mask of the ids that are in it, both (...). For
            other ids the index is arbitrary. These are spread over the part, because a GPU adds
            values of the same entry one after the other.
        """
        index = ids - self.offset
        here = (index >= 0) & (index < self.entries)
        return index.remainder(max(1, self.entries)), here


def localize(logits: torch.Tensor) -> tuple[torch.Tensor, VocabularyShard | None]:
    """Return logits (..., V) as a plain tensor, and their part of the vocabulary (None for all)."""
    if not isinstance(logits, DTensor):
        return logits, None
    shard = VocabularyShard.of(logits, -1)
    return (logits.to_local() if shard else logits.full_tensor()), shard


class Logits:
    """Logits (N, V), float32 or wider, with the differentiable operations that a loss needs."""

    def __init__(self, z: torch.Tensor):
        self.z = z

    def at(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, s) at labels (N, s); arbitrary values at ignored labels."""
        return self.z.gather(-1, labels.clamp_min(0))

    def logsumexp(self) -> torch.Tensor:
        """Return the log-sum-exp over the vocabulary, (N,)."""
        return self.z.logsumexp(-1)

    def total(self, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the sum over the vocabulary of a function of each logit, (N,)."""
        return function(self.z).sum(-1)


class ShardedLogits(Logits):
    """Logits (N, v) of this rank's part of the vocabulary; results are those of the whole.

    Each result is the same on all ranks and needs one reduction.
    """

    def __init__(self, z: torch.Tensor, shard: VocabularyShard):
        super().__init__(z)
        self.shard = shard

    @override
    def at(self, labels: torch.Tensor) -> torch.Tensor:
        index, here = self.shard.find(labels)
        return self._sum(self.z.gather(-1, index).masked_fill(~here, 0.0))

    @override
    def logsumexp(self) -> torch.Tensor:
        of_parts = DTensor.from_local(
            super().logsumexp()[None], self.shard.mesh, [Shard(0)], run_check=False
        )
        return of_parts.full_tensor().logsumexp(0)  # (ranks, N) -> (N,)

    @override
    def total(self, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return self._sum(super().total(function))

    def _sum(self, part: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(part, self.shard.mesh, [Partial()], run_check=False).full_tensor()
