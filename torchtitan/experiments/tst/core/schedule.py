"""Which phase a step is in, and what a batch looks like there. Pure Python.

Steps count from 1, as the trainer's do. The boundary K is the last step of the superposition
phase; step K + 1 is the first of recovery.
"""

from dataclasses import dataclass
from enum import Enum

SCALES = ("sequence", "batch")


class Phase(str, Enum):
    """One of the two parts of a run (paper, Section 3)."""

    SUPERPOSITION = "superposition"
    RECOVERY = "recovery"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class BatchShape:
    """What one micro-batch reads from the loader and what the transformer sees of it.

    Attributes:
        sequences: sequences per micro-batch.
        data_tokens: data tokens per sequence.
        latents: positions per sequence that the transformer sees.
    """

    sequences: int
    data_tokens: int
    latents: int


@dataclass(frozen=True)
class Schedule:
    """Phases of a run as a pure function of the step.

    Attributes:
        bag_size: s, data tokens per bag; 1 switches superposition off.
        boundary: K, the last superposition step; 0 for none.
        mode: "full", "input" or "output"; see :func:`.bags.fold`.
        scale: how a step comes to s times the tokens: "sequence" makes each sequence s times
            longer, so that a step costs what an ordinary one costs (paper, Section 3.2);
            "batch" takes s times the sequences, each of L/s latents.
    """

    bag_size: int = 1
    boundary: int = 0
    mode: str = "full"
    scale: str = "sequence"

    @property
    def enabled(self) -> bool:
        """Whether any step is in superposition."""
        return self.bag_size > 1 and self.boundary > 0

    def phase(self, step: int) -> Phase:
        """The phase of step ``step`` (from 1)."""
        if self.enabled and step <= self.boundary:
            return Phase.SUPERPOSITION
        return Phase.RECOVERY

    def bag_size_at(self, step: int) -> int:
        """The bag size: s in superposition, 1 in recovery."""
        return self.bag_size if self.phase(step) is Phase.SUPERPOSITION else 1

    def batch_shape(self, step: int, batch_size: int, seq_len: int) -> BatchShape:
        """Shape of a micro-batch at ``step`` for an ordinary one of (batch_size, seq_len).

        Raises:
            ValueError: with scale "batch", if bags of s do not divide ``seq_len``.
        """
        s = self.bag_size_at(step)
        if s == 1 or self.mode == "output":
            return BatchShape(batch_size, seq_len, seq_len)
        if self.scale == "sequence":
            return BatchShape(batch_size, s * seq_len, seq_len)
        if seq_len % s:
            raise ValueError(f"{seq_len} tokens do not divide into bags of {s}")
        return BatchShape(s * batch_size, seq_len, seq_len // s)
