"""Errors of TorchTitan's own code while it builds a job, as errors of the config in one line."""

import linecache
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchtitan.train

from ..errors import ConfigTextError, in_one_line

_UPSTREAM = str(Path(torchtitan.train.__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent.parent)
# what torch raises for what it was told, and not for what has happened to it
_OF_TORCH = (AssertionError, ImportError, NotImplementedError, ValueError)


@contextmanager
def refusals_as_config_errors() -> Iterator[None]:
    """Turn an exception that upstream's code raises in this context into a ConfigTextError.

    One of torch is taken for one of upstream that called it if its type says that an argument was
    wrong. All others stay what they are, as do ours.
    """
    try:
        yield
    except Exception as error:
        if frame := _frame_of_upstream(error):
            place = Path(frame.filename).relative_to(Path(_UPSTREAM).parent)
            raise ConfigTextError(
                f"TorchTitan refuses this job: {_text(error, frame)} ({place}, line {frame.lineno})"
            ) from error
        raise


def _frame_of_upstream(error: Exception) -> traceback.FrameSummary | None:
    """Where upstream raised an exception, or called the part of torch that did."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_OURS):
            return None
        if frame.filename.startswith(_UPSTREAM):
            return frame
        if not (frame.filename.startswith(_TORCH) and isinstance(error, _OF_TORCH)):
            return None
    return None


def _text(error: Exception, frame: traceback.FrameSummary) -> str:
    """What an exception says, in one line; of one that says nothing, its line of code."""
    if not str(error).strip():
        return linecache.getline(frame.filename, frame.lineno or 0).strip()
    if isinstance(error, ValueError | NotImplementedError):
        return " ".join(str(error).split())
    return in_one_line(error)
