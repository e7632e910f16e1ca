"""The checkpoint at the boundary."""

import re
from pathlib import Path

import torch.distributed as dist
from torchtitan.components.checkpoint import CheckpointManager
from typing_extensions import override


class BoundaryCheckpointManager(CheckpointManager):
    """Upstream's checkpoint manager that also saves after the last superposition step.

    That checkpoint is full (model, optimizer, schedule, loader) and outlives
    ``checkpoint.keep_latest_k``.
    """

    boundary: int

    @classmethod
    def adopt(cls, checkpointer: CheckpointManager, boundary: int) -> "BoundaryCheckpointManager":
        """Make the manager that upstream's trainer has built, without a hook, one of this class."""
        checkpointer.__class__ = cls
        assert isinstance(checkpointer, cls)
        checkpointer.boundary = boundary
        return checkpointer

    @override
    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        at_boundary = self.enable and not self.load_only and curr_step == self.boundary
        return at_boundary or super()._should_save(curr_step, last_step)

    @override
    def _purge_stale_checkpoints(self) -> None:
        folder = Path(self.folder)
        # an async save may not have made the folder yet
        if self.keep_latest_k <= 0 or dist.get_rank() != 0 or not folder.is_dir():
            return
        steps = sorted(
            int(match[1])
            for path in folder.iterdir()
            if (match := re.fullmatch(r"step-(\d+)", path.name))
        )
        for step in steps[: -self.keep_latest_k]:
            if step != self.boundary:
                self.purge_queue.put(self._create_checkpoint_id(step))
