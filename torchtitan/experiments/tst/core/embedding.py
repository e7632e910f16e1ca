"""Bag-of-token embedding (paper, Section 3.1)."""

import torch
from torch import nn


class BagEmbedding(nn.Embedding):
    """A token embedding that also takes bags: an ordinary ``nn.Embedding`` for (B, L) ids.

    For (B, L, s) ids it gives the mean of each bag's embeddings, (B, L, d), taken in float32 and
    cast back. Parameters and state dict are those of ``nn.Embedding``.
    """

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "BagEmbedding":
        """The same embedding, the weight shared, not copied (it may be tied to an LM head)."""
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
        """Embeddings (B, L, d) of token ids (B, L) or of bags (B, L, s)."""
        # One lookup of all s members: s lookups added up break on a vocabulary-sharded weight.
        embedded = super().forward(input)  # (..., s, d) for bags
        if input.ndim < 3:
            return embedded
        return embedded.mean(dim=-2, dtype=torch.float32).to(embedded.dtype)
