"""Phase, stage and batch shape of a step, in pure Python.

Steps count from 1, as in the trainer. The superposition phase has one or several stages, each with
its own bag size. The boundary K is its last step; step K + 1 is the first of recovery.
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
    """Consecutive steps with the same bag size: a part of the superposition phase, or recovery.

    Attributes:
        bag_size: s, data tokens per bag; 1 in recovery.
        first: first step of the stage.
        last: last step of the stage.
    """

    bag_size: int
    first: int
    last: int

    @property
    def steps(self) -> int:
        """The number of steps in the stage."""
        return self.last - self.first + 1

    @property
    def phase(self) -> Phase:
        """The phase of the stage."""
        return Phase.SUPERPOSITION if self.bag_size > 1 else Phase.RECOVERY

    def __str__(self) -> str:
        return f"{self.phase}" + (f" (s={self.bag_size})" if self.bag_size > 1 else "")


@dataclass(frozen=True)
class BatchShape:
    """The shape of one micro-batch: what it reads from the loader, what the transformer sees.

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
    """The phases and stages of a run, as a pure function of the step.

    Attributes:
        stages: stages of the superposition phase, consecutive from step 1; empty without
            superposition. :meth:`of` makes them.
        mode: "full", "input" or "output"; see :func:`.bags.fold`.
        scale: how a step reads s times the tokens. "sequence" makes each sequence s times longer,
            so that a step costs as much as an ordinary one (paper, Section 3.2). "batch" reads s
            times the sequences, each of L/s latents.
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
        """Build a schedule from the bag size and the number of steps of each stage, in order.

        Stages without steps are skipped. Neighboring stages with the same bag size are merged.

        Args:
            bag_sizes: s of each stage, at least 2.
            steps: number of steps of each stage.
            mode: see the class.
            scale: see the class.

        Raises:
            ValueError: if a bag size is below 2.
        """
        stages: list[Stage] = []
        for bag_size, count in zip(bag_sizes, steps, strict=True):
            if bag_size < 2:
                raise ValueError(f"the bag size of a stage must be at least 2, not {bag_size}")
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
        """K, the last step of superposition; 0 without superposition."""
        return self.stages[-1].last if self.stages else 0

    def until(self, steps: int) -> tuple[Stage, ...]:
        """Return the stages of the first ``steps`` steps, including recovery if they reach it."""
        recovery = Stage(1, self.boundary + 1, steps)
        return tuple(
            replace(stage, last=min(stage.last, steps))
            for stage in (*self.stages, recovery)
            if stage.first <= steps
        )

    def bag_size_at(self, step: int) -> int:
        """Return the bag size of step ``step`` (from 1): s of its stage, 1 in recovery."""
        index = bisect_left(self.stages, step, key=lambda stage: stage.last)
        return self.stages[index].bag_size if index < len(self.stages) else 1

    def phase(self, step: int) -> Phase:
        """Return the phase of step ``step`` (from 1)."""
        return Phase.SUPERPOSITION if step <= self.boundary else Phase.RECOVERY

    def changes_after(self, step: int) -> bool:
        """Return whether a stage ends with ``step``: step ``step + 1`` has another bag size."""
        return self.bag_size_at(step) != self.bag_size_at(step + 1)

    def batch_shape(self, step: int, batch_size: int, seq_len: int) -> BatchShape:
        """Return the shape of a micro-batch at ``step``.

        Args:
            step: the step, from 1.
            batch_size: sequences of an ordinary micro-batch.
            seq_len: tokens of an ordinary sequence.

        Raises:
            ValueError: with scale "batch", if ``seq_len`` is not a multiple of s.
        """
        s = self.bag_size_at(step)
        if s == 1 or self.mode == "output":
            return BatchShape(batch_size, seq_len, seq_len)
        if self.scale == "sequence":
            return BatchShape(batch_size, s * seq_len, seq_len)
        if seq_len % s:
            raise ValueError(f"seq_len {seq_len} must be a multiple of the bag size {s}")
        return BatchShape(s * batch_size, seq_len, seq_len // s)
