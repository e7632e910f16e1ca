"""Tensors without content, and a tracker of the memory that a step of them would take."""

from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import _TOTAL_KEY, MemTracker
from typing_extensions import override

__all__ = ["FakeTensorMode", "PeakMemory"]


class PeakMemory(MemTracker):
    """Torch's tracker, without its peaks for each module, which take ten times as long."""

    @override
    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, snapshot in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < snapshot[_TOTAL_KEY]:
                self._peak_mem[device] = snapshot[_TOTAL_KEY]
                self._peak_mem_snap[device] = dict(snapshot)

    def peak(self) -> tuple[int, dict[str, int]]:
        """The fullest moment so far: all bytes, and those of each kind (PARAM, GRAD, OPT, ...)."""
        (snapshot,) = self.get_tracker_snapshot("peak").values()
        kinds = {getattr(kind, "name", kind): size for kind, size in snapshot.items()}
        return kinds[_TOTAL_KEY], kinds
