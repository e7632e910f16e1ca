"""The order of the tests, and which of them run alone when pytest-xdist has several workers."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# These run first: each test takes a moment, so a mistake shows in seconds.
CHEAP = ("core", "test_job_config.py", "test_train_configs.py", "test_selection.py")


def order(item: pytest.Item) -> int:
    """Return a sort key: cheap tests first, tests that run alone last."""
    if item.get_closest_marker("alone"):
        return 2
    return 0 if item.path.parent.name in CHEAP or item.path.name in CHEAP else 1


@contextlib.contextmanager
def turn(alone: bool) -> Iterator[None]:
    """Wait for this worker's turn. A test that is ``alone`` waits until no other test runs."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        yield
        return
    with (
        _locked(
            f"{run}-next", fcntl.LOCK_EX
        ) as queue,  # nobody overtakes a test that waits to be alone
        _locked(f"{run}-test", fcntl.LOCK_EX if alone else fcntl.LOCK_SH),
    ):
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield


@contextlib.contextmanager
def _locked(name: str, operation: int) -> Iterator[int]:
    file = os.open(Path(tempfile.gettempdir(), f"tst-{name}.lock"), os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(file, operation)
        yield file
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing does not, where a child still has the file
        os.close(file)
