"""Atomic changes in the folder of a run's checkpoints: a kill at any moment does no damage.

A folder is renamed in one step, when everything in it is on disk. :mod:`.inventory` lists the
names.
"""

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from torchtitan.tools.logging import logger

from ...errors import UserError
from .inventory import BOUNDARY, Kind, folders_of_kind, identify, step_folder
from .manifests import CheckpointError, read_manifest

_READING = "reading"
_LONGEST_READ = 24 * 3600  # seconds; older links were left by a kill


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


@contextmanager
def linked(checkpoint: Path) -> Iterator[Path]:
    """Yield a folder with hard links to a checkpoint's files, which its run cannot delete.

    The run may delete or replace the checkpoint meanwhile, on any node. Where links are impossible
    (no permission, or a file system without them), this yields the checkpoint itself.

    Args:
        checkpoint: a folder ``step-N``.

    Raises:
        CheckpointError: if the checkpoint has been deleted.
    """
    with ExitStack() as stack:
        files = checkpoint
        try:
            prefix = f"{_READING}-{checkpoint.name.removeprefix('step-')}-"
            folder = tempfile.TemporaryDirectory(prefix=prefix, dir=checkpoint.parent)
            links = Path(stack.enter_context(folder), checkpoint.name)
            shutil.copytree(checkpoint, links, copy_function=os.link)
            files = links
        except OSError as error:
            if not checkpoint.is_dir():
                raise CheckpointError(
                    f"{checkpoint} has been deleted. Its run keeps the last "
                    "checkpoint.keep_latest_k checkpoints; use a newer one"
                ) from error
            logger.warning(
                f"No hard links to {checkpoint} ({error.strerror or error}): if its run deletes it "
                "meanwhile, it cannot be read"
            )
        try:
            yield files
        except UserError as error:
            error.args = (str(error).replace(str(files), str(checkpoint)),)
            raise


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
    remove_old_links(folder)


def remove_old_links(folder: Path) -> None:
    """Remove the links of :func:`linked` that killed programs have left."""
    for path in folder.glob(f"{_READING}-*"):
        with suppress(FileNotFoundError):  # its program has ended
            if time.time() - path.stat().st_mtime > _LONGEST_READ:
                shutil.rmtree(path, ignore_errors=True)
