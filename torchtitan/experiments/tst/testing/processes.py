"""The processes of a launch, and signals to all of them."""

import os
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """A process's children, and theirs; torchrun's are in other sessions and process groups."""
    found = []
    with suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def signal_tree(pid: int, number: int) -> None:
    """Send a signal to a process and all that it has started."""
    for target in [pid, *descendants(pid)]:
        with suppress(ProcessLookupError):
            os.kill(target, number)
