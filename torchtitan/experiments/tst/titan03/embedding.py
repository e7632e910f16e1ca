"""Bag-of-token embedding for TorchTitan 0.3 (paper, Section 3.1)."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.common import Embedding
from typing_extensions import override

from ..core.embedding import means, partial_means
from ..core.vocabulary import VocabularyShard


class BagEmbedding(Embedding):
    """TorchTitan's embedding, which also accepts bags: for token ids (B, L) it is upstream's.

    For bags (B, L, s) it returns the mean of each bag's embeddings, (B, L, d). With tensor
    parallelism, that is this rank's part of the mean, and the sharding of the module adds the parts
    up, as for single tokens. Parameters and state dict do not change.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):
        """The config of TorchTitan's embedding."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._shard: VocabularyShard | None = None

    @override
    def parallelize(self, parallel_dims: ParallelDims) -> None:
        super().parallelize(parallel_dims)
        mesh = parallel_dims.get_optional_mesh("tp")
        if mesh is not None:
            self._shard = VocabularyShard.of_rank(self.num_embeddings, mesh)

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (B, L, d) of token ids (B, L) or of bags (B, L, s)."""
        if input.ndim < 3:
            return super().forward(input)
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        return partial_means(input, weight, self._shard) if self._shard else means(input, weight)
