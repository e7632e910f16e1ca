"""Fake tensors, and a tracker of the memory that a step of them would need."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import _TOTAL_KEY, MemTracker
from torch.nn.modules.module import register_module_forward_pre_hook
from typing_extensions import override

__all__ = ["Change", "FakeTensorMode", "PeakMemory"]


@dataclasses.dataclass
class Change:
    """The memory that an operation adds, in bytes of each kind.

    Attributes:
        most: added bytes at its peak.
        end: added bytes after it.
    """

    most: dict[Any, int] = dataclasses.field(default_factory=dict)
    end: dict[Any, int] = dataclasses.field(default_factory=dict)

    def without(self, other: "Change") -> "Change":
        """Return the change that is left when ``other`` has already happened."""
        most, end = (
            {kind: size - other.end[kind] for kind, size in sizes.items()}
            for sizes in (self.most, self.end)
        )
        return Change(most, end)


class PeakMemory(MemTracker):
    """Torch's memory tracker, for the peak of the whole step only.

    Torch's own also tracks the peak of each module. That takes ten times as long, and allows only
    one forward and backward of each module.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker: Any = _FirstForwards(self._track_module_params_and_buffers)
        self._fullest: dict[Any, int] = {}  # peak of the operation that is observed

    @override
    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, snapshot in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < snapshot[_TOTAL_KEY]:
                self._peak_mem[device] = snapshot[_TOTAL_KEY]
                self._peak_mem_snap[device] = dict(snapshot)
            if self._fullest and self._fullest[_TOTAL_KEY] < snapshot[_TOTAL_KEY]:
                self._fullest = dict(snapshot)

    @contextlib.contextmanager
    def observed(self) -> Iterator[Change]:
        """Yield a change, which is filled in at the end of the context."""
        change = Change()
        (snapshot,) = self._curr_mem_snap.values()
        before = self._fullest = dict(snapshot)
        yield change
        change.most = {kind: size - before[kind] for kind, size in self._fullest.items()}
        change.end = {kind: size - before[kind] for kind, size in snapshot.items()}
        self._fullest = {}

    def repeat(self, change: Change) -> None:
        """Count an operation that is not simulated, by the change of an earlier equal one."""
        (snapshot,) = self._curr_mem_snap.values()
        now = dict(snapshot)
        snapshot.update({kind: size + change.most[kind] for kind, size in now.items()})
        self._update_peak_stats(None)
        snapshot.update({kind: size + change.end[kind] for kind, size in now.items()})

    def peak(self) -> tuple[int, dict[str, int]]:
        """Return the peak so far: all bytes, and those of each kind (PARAM, GRAD, OPT, ...)."""
        (snapshot,) = self.get_tracker_snapshot("peak").values()
        kinds = {getattr(kind, "name", kind): size for kind, size in snapshot.items()}
        return kinds[_TOTAL_KEY], kinds


class _FirstForwards:
    """Calls a function with each module before its first forward, instead of torch's ModTracker.

    FSDP has gathered the parameters of a module by then; the function tells the tracker of them.
    """

    is_bw = False  # it tells activations from temporary tensors; here both are "rest"

    def __init__(self, function: Callable[[torch.nn.Module], Any]):
        self.function = function
        self.seen: set[torch.nn.Module] = set()

    def __enter__(self) -> None:
        self.handle = register_module_forward_pre_hook(self._before_forward)

    def __exit__(self, *args: Any) -> None:
        self.handle.remove()

    def register_user_hooks(self, *hooks: Any) -> None:
        """Ignore the tracker's hooks, which are for the peaks of each module."""

    def clear_user_hooks(self) -> None:
        """Do nothing: there are no hooks."""

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        if module not in self.seen:
            self.seen.add(module)
            self.function(module)
