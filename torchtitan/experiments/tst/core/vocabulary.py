"""A vocabulary sharded over ranks, by tensor parallelism: the embedding's and the logits'.

Logits as the losses ask of them are whole, or, with loss parallel, a part of the vocabulary on each
rank, and no rank ever has all of them.
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
        offset: of its first entry.
        entries: how many it has.
        mesh: of one dimension, over which the vocabulary is sharded.
    """

    offset: int
    entries: int
    mesh: DeviceMesh

    @classmethod
    def of(cls, tensor: torch.Tensor, dim: int) -> "VocabularyShard | None":
        """Of a tensor whose dimension ``dim`` is the vocabulary; None if it is not sharded so."""
        if not isinstance(tensor, DTensor):
            return None
        mesh, placements = tensor.device_mesh, tensor.placements
        if tuple(placements) != (Shard(dim % tensor.ndim),):
            return None
        size, ranks = tensor.shape[dim], mesh.size()
        chunk = -(-size // ranks)  # as torch.chunk cuts it
        offset = min(chunk * mesh.get_local_rank(), size)
        return cls(offset, min(chunk, size - offset), mesh)

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find token ids (...) in this part: an index into it for each, and which are here at all.

        The index of an id that is elsewhere is any of this part's. They are spread over it, because
        a GPU adds up what falls on one entry one after the other.
        """
        index = ids - self.offset
        here = (index >= 0) & (index < self.entries)
        return index.remainder(max(1, self.entries)), here


def localize(logits: torch.Tensor) -> tuple[torch.Tensor, VocabularyShard | None]:
    """Logits (..., V) as a plain tensor, and which part of the vocabulary it has; None for all."""
    if not isinstance(logits, DTensor):
        return logits, None
    shard = VocabularyShard.of(logits, -1)
    return (logits.to_local() if shard else logits.full_tensor()), shard


class Logits:
    """Logits (N, V), float32 or wider, at their labels and over the vocabulary. Differentiable."""

    def __init__(self, z: torch.Tensor):
        self.z = z

    def at(self, labels: torch.Tensor) -> torch.Tensor:
        """(N, s), at labels (N, s); anything where a label is ignored."""
        return self.z.gather(-1, labels.clamp_min(0))

    def logsumexp(self) -> torch.Tensor:
        """(N,)."""
        return self.z.logsumexp(-1)

    def total(self, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Of the function of each logit, (N,)."""
        return function(self.z).sum(-1)


class ShardedLogits(Logits):
    """The same of logits (N, v) that are a part of the vocabulary; results are of the whole.

    Each result is the same on all ranks, and costs one reduction.
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
