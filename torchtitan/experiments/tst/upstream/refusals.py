"""Report errors while TorchTitan builds a job as config errors in one line.

These are errors of TorchTitan's own code, and refusals of a user's code, such as a model.
"""

import linecache
import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchtitan.train

from ..errors import ConfigTextError, in_one_line

# folders, each with a separator at its end
_UPSTREAM = f"{Path(torchtitan.train.__file__).parent}{os.sep}"
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_OURS = f"{Path(__file__).parent.parent}{os.sep}"
_STANDARD = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))
_INSTALLED = {"site-packages", "dist-packages"}  # names of folders of installed packages
# exceptions that torch raises for wrong arguments, and not for failures at run time
_OF_TORCH = (AssertionError, ImportError, NotImplementedError, ValueError)


@contextmanager
def refusals_as_config_errors() -> Iterator[None]:
    """Turn an exception that upstream's code raises in this context into a ConfigTextError.

    An exception of torch counts as upstream's if its type says that an argument was wrong. A
    ValueError or NotImplementedError that a user's code raises is a refusal, too: code of a model,
    a loader or a tokenizer that is in no installed package. All other exceptions, and those of this
    package, are not changed.
    """
    try:
        yield
    except Exception as error:
        if frame := _frame_of_user(error):
            raise ConfigTextError(
                f"your code refuses this job: {_text(error, frame)} ({frame.filename}, line "
                f"{frame.lineno})"
            ) from error
        if frame := _frame_of_upstream(error):
            place = Path(frame.filename).relative_to(Path(_UPSTREAM).parent)
            raise ConfigTextError(
                f"TorchTitan refuses this job: {_text(error, frame)} ({place}, line {frame.lineno})"
            ) from error
        raise


def _frame_of_upstream(error: Exception) -> traceback.FrameSummary | None:
    """Return the frame where upstream raised an exception or called torch; None for others."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_OURS):
            return None
        if frame.filename.startswith(_UPSTREAM):
            return frame
        if not (frame.filename.startswith(_TORCH) and isinstance(error, _OF_TORCH)):
            return None
    return None


def _frame_of_user(error: Exception) -> traceback.FrameSummary | None:
    """Return the frame where a user's code refused the job; None for others."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    refusal = isinstance(error, ValueError | NotImplementedError)
    others = (*_STANDARD, _UPSTREAM, _TORCH, _OURS, "<")  # "<string>" is no file
    of_others = frame.filename.startswith(others) or _INSTALLED & {*Path(frame.filename).parts}
    return frame if refusal and not of_others else None


def _text(error: Exception, frame: traceback.FrameSummary) -> str:
    """Return the message of an exception in one line, or its line of code without a message."""
    if not str(error).strip():
        return linecache.getline(frame.filename, frame.lineno or 0).strip()
    if isinstance(error, ValueError | NotImplementedError):
        return " ".join(str(error).split())
    return in_one_line(error)
