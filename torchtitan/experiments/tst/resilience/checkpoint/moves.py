"""Atomic changes in the folder of a run's checkpoints: a kill at any moment does no damage.

A folder is renamed in one step, when everything in it is on disk. :mod:`.inventory` lists the
names.
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
    """Rename a complete save from ``saving-N`` to ``step-N``, in one step."""
    saving, final = step_folder(folder, step, "saving"), step_folder(folder, step)
    sync_folder(saving)
    if boundary:
        link = folder / f"{BOUNDARY}.new"
        with suppress(OSError):  # on a file system without links
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            link.replace(folder / BOUNDARY)
    if final.exists():
        if identify(final) in (Kind.FULL, Kind.INCOMPLETE):
            set_aside(folder, step, "deleting")
        else:
            kept = _keep_replaced(folder, step)
            logger.warning(f"Renamed {final} to {kept}, because step {step} is saved again")
    saving.rename(final)
    sync_folder(folder)
    shutil.rmtree(step_folder(folder, step, "deleting"), ignore_errors=True)


def _keep_replaced(folder: Path, step: int) -> Path:
    names = (f"replaced-{step}" + f"-{n}" * (n > 1) for n in itertools.count(1))
    free = next(path for name in names if not (path := folder / name).exists())
    return step_folder(folder, step).rename(free)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(folder: Path, step: int, kind: str) -> Path:
    """Rename ``step-N`` to ``kind-N``, so that no launch resumes from it. Return the new path."""
    path = step_folder(folder, step, kind)
    shutil.rmtree(path, ignore_errors=True)
    return step_folder(folder, step).rename(path)


def tidy(folder: Path) -> Iterable[str]:
    """Finish what a kill interrupted; yield a message for each change."""
    for _, path in folders_of_kind(folder, "deleting"):
        shutil.rmtree(path, ignore_errors=True)
    for step, path in folders_of_kind(folder, "saving"):
        manifest = None
        with suppress(CheckpointError):
            manifest = read_manifest(path)
        if manifest:
            publish(folder, step, manifest["boundary"])
            yield f"Renamed {path} to step-{step}: its save was cut short after the last file"
        else:
            shutil.rmtree(path, ignore_errors=True)
            yield f"Removed {path}: its save was cut short"
