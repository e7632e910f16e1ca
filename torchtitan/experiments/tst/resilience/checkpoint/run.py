"""What the checkpoint manager asks of the trainer and of the loader."""

from typing import Any, Protocol, runtime_checkable


class Run(Protocol):
    """What the manager asks of the trainer."""

    step: int

    @property
    def dp_degree(self) -> int:
        """Number of data-parallel ranks."""

    @property
    def stopping(self) -> bool:
        """Whether the run ends after this step, which then needs a checkpoint."""

    def is_boundary(self, step: int) -> bool:
        """Whether the link ``boundary`` is to name the checkpoint after this step."""

    def keeps_checkpoint(self, step: int) -> bool:
        """Whether the checkpoint after this step is written in any case, and never deleted."""

    def manifest(self) -> dict[str, Any]:
        """What to write into the manifest of a checkpoint of now; "run" holds the run's facts."""

    def contradictions(self, manifest: dict[str, Any], not_loaded: list[str]) -> list[str]:
        """Where the job differs from a checkpoint; ``not_loaded`` states are not taken from it."""

    def restore(self, manifest: dict[str, Any]) -> None:
        """Take on what the manifest holds, after the states are loaded."""

    def share(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank."""


@runtime_checkable
class SharedPosition(Protocol):
    """A loader whose position in the data any number of ranks can share."""

    def set_streams(self, count: int) -> None:
        """Read from ``count`` streams, as many as the checkpoint has positions of."""
