"""The method itself: it needs torch only, so you can copy the folder into any PyTorch loop.

A batch in the superposition phase, with B sequences, L latents, bags of s tokens, width d and
vocabulary V::

    tokens (B, L*s) -> fold -> inputs (B, L, s), labels (B, L, s)
    inputs -> BagEmbedding -> (B, L, d) -> unchanged transformer -> logits (B, L, V)
    logits, labels -> BagLoss -> scalar

A LossHead instead of the LM head returns that scalar without ever storing all the logits.
"""

from .bags import IGNORE_INDEX, MODES, document_ids, fold
from .embedding import BagEmbedding
from .head import LossHead
from .load_balance import ExpertLoad, load_balancing_loss
from .losses import LOSSES, WEIGHTINGS, BagLoss, offset_weights
from .schedule import SCALES, BatchShape, Phase, Schedule, Stage

__all__ = [
    "IGNORE_INDEX",
    "LOSSES",
    "MODES",
    "SCALES",
    "WEIGHTINGS",
    "BagEmbedding",
    "BagLoss",
    "BatchShape",
    "ExpertLoad",
    "LossHead",
    "Phase",
    "Schedule",
    "Stage",
    "document_ids",
    "fold",
    "load_balancing_loss",
    "offset_weights",
]
