"""Tensors without content, and a tracker of the memory that a step of them would take."""

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
    """What an operation adds to the memory, in bytes of each kind.

    Attributes:
        most: at its fullest moment.
        end: when it is done.
    """

    most: dict[Any, int] = dataclasses.field(default_factory=dict)
    end: dict[Any, int] = dataclasses.field(default_factory=dict)

    def without(self, other: "Change") -> "Change":
        """Return the change that is left if what is there after ``other`` was there before."""
        most, end = (
            {kind: size - other.end[kind] for kind, size in sizes.items()}
            for sizes in (self.most, self.end)
        )
        return Change(most, end)


class PeakMemory(MemTracker):
    """Torch's tracker of memory, for peaks of the whole step only.

    Torch's also takes peaks of each module, which takes ten times as long and allows one forward
    and backward of each module.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker: Any = _FirstForwards(self._track_module_params_and_buffers)
        self._fullest: dict[Any, int] = {}  # of the operation that is observed

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
        """Fill in, at the end, what happens to the memory in this context."""
        change = Change()
        (snapshot,) = self._curr_mem_snap.values()
        before = self._fullest = dict(snapshot)
        yield change
        change.most = {kind: size - before[kind] for kind, size in self._fullest.items()}
        change.end = {kind: size - before[kind] for kind, size in snapshot.items()}
        self._fullest = {}

    def repeat(self, change: Change) -> None:
        """Count an operation that is not played, because it changes the memory as one before."""
        (snapshot,) = self._curr_mem_snap.values()
        now = dict(snapshot)
        snapshot.update({kind: size + change.most[kind] for kind, size in now.items()})
        self._update_peak_stats(None)
        snapshot.update({kind: size + change.end[kind] for kind, size in now.items()})

    def peak(self) -> tuple[int, dict[str, int]]:
        """The fullest moment so far: all bytes, and those of each kind (PARAM, GRAD, OPT, ...)."""
        (snapshot,) = self.get_tracker_snapshot("peak").values()
        kinds = {getattr(kind, "name", kind): size for kind, size in snapshot.items()}
        return kinds[_TOTAL_KEY], kinds


class _FirstForwards:
    """Calls a function with each module before its first forward, instead of torch's ModTracker.

    FSDP has gathered the parameters of a module by then; the function tells the tracker of them.
    """

    is_bw = False  # which tells apart activations from temporary tensors; both are "rest"

    def __init__(self, function: Callable[[torch.nn.Module], Any]):
        self.function = function
        self.seen: set[torch.nn.Module] = set()

    def __enter__(self) -> None:
        self.handle = register_module_forward_pre_hook(self._before_forward)

    def __exit__(self, *args: Any) -> None:
        self.handle.remove()

    def register_user_hooks(self, *hooks: Any) -> None:
        """Take none of the tracker's hooks, which are for peaks of each module."""

    def clear_user_hooks(self) -> None:
        """Nothing to clear."""

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        if module not in self.seen:
            self.seen.add(module)
            self.function(module)
