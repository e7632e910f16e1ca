"""A run's checkpoints as folders: which are complete, which are damaged. No torch.

In the run's checkpoint folder (``checkpoint.folder``):

- ``step-N``: a complete checkpoint. It has its name only once everything in it is on disk.
- ``boundary``: link to the checkpoint of the last superposition step.
- ``saving-N``: a save that is going on, or was cut short.
- ``deleting-N``: a deletion that is going on, or was cut short.
- ``damaged-N``: set aside by ``resilience.skip_damaged``.

A checkpoint has ``manifest.json`` beside DCP's own files: size and checksum of each of them, and
what the run was. Upstream's own trainer writes none and needs none.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

MANIFEST, METADATA, BOUNDARY = "manifest.json", ".metadata", "boundary"
_CHECKSUM = "xxh3_128"
_CHUNK = 1 << 24  # bytes


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found, trusted or used; the message says which."""


def new_checksum() -> Any:
    """The checksum of the manifest, as a hash object: fast, for faults and not for attackers."""
    return xxhash.xxh3_128()


def write_manifest(folder: Path, content: dict[str, Any], files: dict[str, dict]) -> None:
    """Write the manifest: ``content``, and the entry of every file by its name."""
    manifest = content | {"files": files}
    manifest[_CHECKSUM] = _checksum_of(manifest)
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The checkpoint's manifest; None if it has none.

    Raises:
        CheckpointError: if the manifest itself is damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        checksum = manifest.pop(_CHECKSUM)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error!r}") from None
    if checksum != _checksum_of(manifest):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: not the content that was written")
    return manifest


def _checksum_of(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def damages(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What differs from the manifest's ``files``, each with the name of the file."""
    found = []
    for name, written in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != written["bytes"]:
                found.append(f"{path}: {size:,} bytes, of {written['bytes']:,} that were written")
            elif file_checksum(path) != written[_CHECKSUM]:
                found.append(f"{path}: not the content that was written (checksum)")
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
    return found


def file_entry(size: int, checksum: str) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": size, _CHECKSUM: checksum}


def file_checksum(path: Path) -> str:
    """Checksum of the file's content."""
    checksum = new_checksum()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            checksum.update(buffer[:size])
    return checksum.hexdigest()


def step_folder(folder: Path, step: int, kind: str = "step") -> Path:
    """Where the checkpoint of ``step`` is, or is being made or unmade."""
    return folder / f"{kind}-{step}"


def complete_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    return [step for step, path in _named(folder, "step") if (path / METADATA).is_file()]


def newest_resumable(folder: Path) -> Path | None:
    """The checkpoint that a launch would go on from, by what the manifests say of themselves."""
    for step in reversed(complete_steps(folder)):
        path = step_folder(folder, step)
        with suppress(CheckpointError):
            if (manifest := read_manifest(path)) and manifest["resumable"]:
                return path
    return None


def incomplete(folder: Path) -> list[Path]:
    """Folders that look like checkpoints and are none: upstream's trainer was cut short there."""
    return [
        path
        for _, path in _named(folder, "step")
        if not (path / METADATA).is_file() and not any(path.glob("*.safetensors"))
    ]


def _named(folder: Path, kind: str) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return sorted(
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(rf"{kind}-(\d+)", path.name))
    )


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
        set_aside(folder, step, "deleting")
    saving.rename(final)
    sync_folder(folder)
    shutil.rmtree(step_folder(folder, step, "deleting"), ignore_errors=True)


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
    for _, path in _named(folder, "deleting"):
        shutil.rmtree(path, ignore_errors=True)
    for step, path in _named(folder, "saving"):
        manifest = None
        with suppress(CheckpointError):
            manifest = read_manifest(path)
        if manifest:
            publish(folder, step, manifest["boundary"])
            yield f"{path} was complete but for its name: it is step-{step} now"
        else:
            shutil.rmtree(path, ignore_errors=True)
            yield f"Skipped and removed {path}: its save was cut short"


def is_boundary(checkpoint: Path) -> bool:
    """Whether the checkpoint is one of the last superposition step."""
    with suppress(CheckpointError):
        manifest = read_manifest(checkpoint)
        return manifest is not None and manifest["boundary"]
    return False
