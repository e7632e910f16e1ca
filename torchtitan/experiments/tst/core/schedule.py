"""Which phase and stage a step is in, and what a batch looks like there. Pure Python.

Steps count from 1, as the trainer's do. The superposition phase has one stage, or several with a
bag size each. The boundary K is its last step; step K + 1 is the first of recovery.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

SCALES = ("sequence", "batch")


class Phase(str, Enum):
    """One of the two parts of a run (paper, Section 3)."""

    SUPERPOSITION = "superposition"
    RECOVERY = "recovery"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Stage:
    """Steps of one bag size: a part of the superposition phase, or recovery.

    Attributes:
        bag_size: s, data tokens per bag; 1 in recovery.
        first: its first step.
        last: its last step.
    """

    bag_size: int
    first: int
    last: int

    @property
    def steps(self) -> int:
        """The number of its steps."""
        return self.last - self.first + 1

    @property
    def phase(self) -> Phase:
        """The phase that it is in."""
        return Phase.SUPERPOSITION if self.bag_size > 1 else Phase.RECOVERY

    def __str__(self) -> str:
        return f"{self.phase}" + (f" (s={self.bag_size})" if self.bag_size > 1 else "")


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
    """Phases and stages of a run as a pure function of the step.

    Attributes:
        stages: of the superposition phase, the first from step 1 and each from the end of the one
            before; none without superposition. :meth:`of` makes them.
        mode: "full", "input" or "output"; see :func:`.bags.fold`.
        scale: how a step comes to s times the tokens: "sequence" makes each sequence s times
            longer, so that a step costs what an ordinary one costs (paper, Section 3.2);
            "batch" takes s times the sequences, each of L/s latents.
    """

    stages: tuple[Stage, ...] = ()
    mode: str = "full"
    scale: str = "sequence"

    @classmethod
    def of(
        cls,
        bag_sizes: Sequence[int],
        steps: Sequence[int],
        mode: str = "full",
        scale: str = "sequence",
    ) -> "Schedule":
        """The schedule of stages in this order.

        A stage without steps is skipped, and neighbors of one bag size are one stage.

        Args:
            bag_sizes: s of each stage, at least 2.
            steps: the number of steps of each stage.
            mode: see the class.
            scale: see the class.

        Raises:
            ValueError: for a bag size below 2.
        """
        stages: list[Stage] = []
        for bag_size, count in zip(bag_sizes, steps, strict=True):
            if bag_size < 2:
                raise ValueError(f"a stage has bags of at least 2 tokens, not {bag_size}")
            last = stages[-1].last if stages else 0
            if count and stages and stages[-1].bag_size == bag_size:
                stages[-1] = replace(stages[-1], last=last + count)
            elif count:
                stages.append(Stage(bag_size, last + 1, last + count))
        return cls(tuple(stages), mode, scale)

    @property
    def enabled(self) -> bool:
        """Whether any step is in superposition."""
        return bool(self.stages)

    @property
    def boundary(self) -> int:
        """K, the last superposition step; 0 for none."""
        return self.stages[-1].last if self.stages else 0

    def until(self, steps: int) -> tuple[Stage, ...]:
        """The stages of the first ``steps`` steps; the last is recovery, if they come so far."""
        recovery = Stage(1, self.boundary + 1, steps)
        return tuple(
            replace(stage, last=min(stage.last, steps))
            for stage in (*self.stages, recovery)
            if stage.first <= steps
        )

    def bag_size_at(self, step: int) -> int:
        """The bag size of step ``step`` (from 1): s of its stage, 1 in recovery."""
        index = bisect_left(self.stages, step, key=lambda stage: stage.last)
        return self.stages[index].bag_size if index < len(self.stages) else 1

    def phase(self, step: int) -> Phase:
        """The phase of step ``step`` (from 1)."""
        return Phase.SUPERPOSITION if step <= self.boundary else Phase.RECOVERY

    def changes_after(self, step: int) -> bool:
        """Whether step ``step + 1`` has another bag size: a stage ends here, or at K the phase."""
        return self.bag_size_at(step) != self.bag_size_at(step + 1)

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
