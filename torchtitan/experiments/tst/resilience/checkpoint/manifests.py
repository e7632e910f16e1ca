"""The manifest of a checkpoint: its files with their checksums, and a record of the run.

A checkpoint has ``manifest.json`` next to DCP's or safetensors files. It holds the size and the
checksum of each file, and the facts of the run. Upstream's own trainer neither writes nor needs it.
This module does not import torch.
"""

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from ...errors import UserError

MANIFEST, METADATA = "manifest.json", ".metadata"  # the latter is DCP's
_CHECKSUM = "xxh3_128"
_CHUNK = 1 << 24  # bytes


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, found, trusted or used; the message says why."""

    title = "checkpoint error"


class ContradictionError(CheckpointError):
    """A job that contradicts the checkpoint that it would resume from."""

    def __init__(self, folder: str | Path, found: list[str]):
        listed = "".join(f"\n  {line}" for line in found)
        super().__init__(
            f"the config contradicts the checkpoint {folder}:{listed}\n"
            "Launch with the checkpoint's values. To keep the config's, add "
            "--resilience.allow_config_mismatch. To begin other data at its start, add "
            "--checkpoint.exclude_from_loading dataloader"
        )


def differences(saved: dict[str, Any], facts: dict[str, Any], ignored: set[str]) -> list[str]:
    """Return where a job's facts differ from those of a checkpoint, with both values in each line.

    Args:
        saved: facts of the run that wrote the checkpoint, by key.
        facts: facts of the job, by key.
        ignored: keys that are not compared.
    """
    return [
        f"{key} = {facts.get(key)!r}, but {value!r} in the checkpoint"
        for key, value in saved.items()
        if key not in ignored and facts.get(key) != value
    ]


def new_checksum() -> Any:
    """Return a hash object for the manifest's checksums: fast, but not safe against attackers."""
    return xxhash.xxh3_128()


def write_manifest(folder: Path, content: dict[str, Any], files: dict[str, dict]) -> None:
    """Write the manifest: ``content``, and the entry of each file by its name."""
    manifest = content | {"files": files}
    manifest[_CHECKSUM] = _checksum_of(manifest)
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the checkpoint's manifest; None if it has none.

    Raises:
        CheckpointError: if the manifest itself is damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if not {_CHECKSUM, "files"} & manifest.keys():
            return None  # another program's file
        checksum = manifest.pop(_CHECKSUM)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error!r}") from None
    if checksum != _checksum_of(manifest):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its checksum does not match")
    return manifest


def _checksum_of(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def identity(folder: Path) -> str:
    """Return a text that identifies the content of a checkpoint.

    It is the manifest's checksum. Without a manifest, it is made of the names, sizes and times of
    the files.

    Raises:
        CheckpointError: if the manifest is damaged.
    """
    if manifest := read_manifest(folder):
        return _checksum_of(manifest)
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in folder.rglob("*")
        if path.is_file()
    }
    return _checksum_of(files)


def damages(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Return the differences of a checkpoint's files from the manifest's ``files``, by path."""
    found = []
    for name, written in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != written["bytes"]:
                found.append(f"{path}: {size:,} bytes, but {written['bytes']:,} were written")
            elif file_checksum(path) != written[_CHECKSUM]:
                found.append(f"{path}: its checksum does not match")
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
    return found


def file_entry(size: int, checksum: str) -> dict[str, Any]:
    """Return a file's entry for the manifest."""
    return {"bytes": size, _CHECKSUM: checksum}


def entry_of(path: Path) -> dict[str, Any]:
    """Sync a file to disk, and return its entry for the manifest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_entry(path.stat().st_size, file_checksum(path))


def file_checksum(path: Path) -> str:
    """Return the checksum of a file's content."""
    checksum = new_checksum()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            checksum.update(buffer[:size])
    return checksum.hexdigest()
