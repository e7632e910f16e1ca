"""The protocols of the trainer and of the loader for the checkpoint manager."""

from typing import Any, Protocol, runtime_checkable


class Run(Protocol):
    """The part of the trainer that the checkpoint manager uses."""

    step: int

    @property
    def dp_degree(self) -> int:
        """Number of data-parallel ranks."""

    @property
    def stopping(self) -> bool:
        """Whether the run ends after this step, which then needs a checkpoint."""

    def is_boundary(self, step: int) -> bool:
        """Return whether the link ``boundary`` will name the checkpoint after this step."""

    def keeps_checkpoint(self, step: int) -> bool:
        """Return whether the checkpoint after this step is always written and never deleted."""

    def manifest(self) -> dict[str, Any]:
        """Return the manifest's content for a checkpoint that is written now.

        Its "run" holds the facts of the run.
        """

    def contradictions(self, manifest: dict[str, Any], not_loaded: list[str]) -> list[str]:
        """Return where the job differs from a checkpoint, without its ``not_loaded`` states."""

    def restore(self, manifest: dict[str, Any]) -> None:
        """Restore what the manifest holds, after the states are loaded."""

    def share(self, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, on every rank."""


@runtime_checkable
class SharedPosition(Protocol):
    """A loader whose data positions can be redistributed over any number of ranks."""

    def set_streams(self, count: int) -> None:
        """Read from ``count`` streams, one for each position in the checkpoint."""
