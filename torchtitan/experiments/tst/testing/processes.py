"""The processes of a launch, and signals to all of them."""

import os
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Return the process IDs of all descendants of a process, whatever their process groups."""
    found = []
    with suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def signal_tree(pid: int, number: int) -> None:
    """Send a signal to a process and all its descendants."""
    for target in [pid, *descendants(pid)]:
        with suppress(ProcessLookupError):
            os.kill(target, number)
