"""The engine that runs a job: the code for TorchTitan 0.2.2, or that for 0.3.

The installed TorchTitan decides. Importing this module imports neither.
"""

import importlib
import importlib.metadata
from types import ModuleType
from typing import Literal

from .errors import ArgumentError

Engine = Literal["0.2", "0.3"]

RELEASES: dict[str, str] = {"0.2": "0.2.2", "0.3": "0.3.0"}  # that each engine is made for


def installed_release() -> str:
    """Return the version of the installed TorchTitan."""
    try:
        return importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return importlib.import_module("torchtitan").__version__


def is_03() -> bool:
    """Return whether the installed TorchTitan needs the engine 0.3."""
    return installed_release().startswith("0.3.")


def check_engine(expected: Engine | None) -> None:
    """Check that the installed TorchTitan is the one that a user expects.

    Args:
        expected: the engine; None for any.

    Raises:
        ArgumentError: if another TorchTitan is installed.
    """
    if expected and (expected == "0.3") != is_03():
        raise ArgumentError(
            f"--engine {expected}: TorchTitan {installed_release()} is installed; use an "
            f"environment with torchtitan=={RELEASES[expected]}, or remove this option"
        )


def start_module() -> ModuleType:
    """Return the module that reads, checks and starts jobs: :mod:`.start`, or that of 0.3."""
    return importlib.import_module(".titan03.start" if is_03() else ".start", __package__)
