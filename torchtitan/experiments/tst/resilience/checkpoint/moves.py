"""Changes in the folder of a run's checkpoints that a kill at any moment cannot spoil.

A folder is renamed in one step, when everything in it is on disk. The names are listed in
:mod:`.inventory`.
"""

import itertools
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from torchtitan.tools.logging import logger

from .inventory import BOUNDARY, Kind, folders_of_kind, identify, step_folder
from .manifests import CheckpointError, read_manifest


def publish(folder: Path, step: int, boundary: bool) -> None:
    """Give a save that is complete its name, at once."""
    saving, final = step_folder(folder, step, "saving"), step_folder(folder, step)
    sync_folder(saving)
    if boundary:
        link = folder / f"{BOUNDARY}.new"
        with suppress(OSError):  # of a file system without links
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            link.replace(folder / BOUNDARY)
    if final.exists():
        if identify(final) in (Kind.FULL, Kind.INCOMPLETE):
            set_aside(folder, step, "deleting")
        else:
            logger.warning(f"{final} is now {_keep_replaced(folder, step)}: step {step} is saved")
    saving.rename(final)
    sync_folder(folder)
    shutil.rmtree(step_folder(folder, step, "deleting"), ignore_errors=True)


def _keep_replaced(folder: Path, step: int) -> Path:
    names = (f"replaced-{step}" + f"-{n}" * (n > 1) for n in itertools.count(1))
    free = next(path for name in names if not (path := folder / name).exists())
    return step_folder(folder, step).rename(free)


def sync_folder(folder: Path) -> None:
    """Have the names in it on disk before going on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(folder: Path, step: int, kind: str) -> Path:
    """Rename ``step-N`` to ``kind-N``, which no resume looks at."""
    path = step_folder(folder, step, kind)
    shutil.rmtree(path, ignore_errors=True)
    return step_folder(folder, step).rename(path)


def tidy(folder: Path) -> Iterable[str]:
    """Finish what a kill interrupted: gives what was found and done."""
    for _, path in folders_of_kind(folder, "deleting"):
        shutil.rmtree(path, ignore_errors=True)
    for step, path in folders_of_kind(folder, "saving"):
        manifest = None
        with suppress(CheckpointError):
            manifest = read_manifest(path)
        if manifest:
            publish(folder, step, manifest["boundary"])
            yield f"{path} was complete and is now step-{step}: its save was cut short at the end"
        else:
            shutil.rmtree(path, ignore_errors=True)
            yield f"Skipped and removed {path}: its save was cut short"
