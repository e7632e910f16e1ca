"""The checkpoints of TorchTitan 0.3, with one at the boundary that is never deleted."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.tools import filesystem
from typing_extensions import override


class BoundaryCheckpointManager(CheckpointManager):
    """TorchTitan's checkpoint manager, which also saves the steps that the trainer keeps.

    Attributes:
        keeps: whether the checkpoint of a step is written in any case, and never deleted.
    """

    keeps: Callable[[int], bool] = staticmethod(lambda step: False)

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """The config of TorchTitan's checkpoint manager."""

    @override
    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        if self.keeps(curr_step) and not self.load_only:
            return True
        return super()._should_save(curr_step, last_step)

    @override
    def _purge_stale_checkpoints(self) -> None:
        if not self._should_purge():
            return
        found = (re.search(r"step-(\d+)", name) for name in filesystem.listdir(self.folder))
        steps = {int(match[1]): match.string for match in found if match}
        for step in sorted(step for step in steps if not self.keeps(step))[: -self.keep_latest_k]:
            self.purge_queue.put(filesystem.join(self.folder, steps[step]))
