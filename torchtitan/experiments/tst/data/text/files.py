"""List the files of a text corpus, and those that are skipped."""

import glob
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ..errors import DataError
from .records import PARQUET, Document

JSONL = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz")

_HIDDEN, _EMPTY, _OTHER = "hidden", "of 0 bytes", "of another kind"
_FOLDERS = "folders that the pattern matches"
_NAMES = 3  # of skipped files in a message


@dataclass
class DataFiles:
    """The files of a corpus.

    Attributes:
        read: paths or URLs of the files to read, sorted.
        skipped: reason -> names of the files and folders (which end in "/") that are skipped.
    """

    read: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the number of files to read, and of each kind."""
        kinds = Counter(_kind(file) for file in self.read)
        count = f"{len(self.read):,} file{'s' * (len(self.read) != 1)}"
        return f"{count} ({', '.join(f'{n:,} {kind}' for kind, n in sorted(kinds.items()))})"

    def checksum(self) -> str:
        """Return an XXH3-64 checksum of the names and sizes of local files, hexadecimal.

        Names are relative to the folder that holds all files. A position in the data counts
        documents of these files, in this order.
        """
        top = os.path.commonpath(self.read)
        listed = [(os.path.relpath(path, top), Path(path).stat().st_size) for path in self.read]
        return xxhash.xxh3_64_hexdigest(json.dumps(listed).encode())

    def warning(self) -> str:
        """Return which files are skipped and why; empty without any."""
        count = sum(map(len, self.skipped.values()))
        parts = [
            f"{len(names):,} {reason} ({', '.join(sorted(names)[:_NAMES])}"
            f"{', ...' if len(names) > _NAMES else ''})"
            for reason, names in sorted(self.skipped.items())
        ]
        return f"{count:,} skipped: {'; '.join(parts)}" if count else ""


class _File(NamedTuple):
    path: str
    name: str  # below the folder, or of the match
    size: int | None
    hidden: bool = False


class _Listed(NamedTuple):
    files: list[_File]
    is_pattern: bool = False
    folders: Sequence[str] = ()  # that a pattern matches, and that are not looked into


def data_files(path: str, suffixes: tuple[str, ...]) -> DataFiles:
    """List the files of a corpus, given as a file, a folder, a pattern, or a URL of one of these.

    - A single file is read whatever its name is.
    - In a folder, files with one of the suffixes are read, at any depth. Empty files and hidden
      files are skipped. A file is hidden if its name begins with ".", or the name of a folder above
      it begins with "." or "_".
    - The matches of a pattern are treated in the same way. But if none has one of the suffixes,
      files of all kinds are read.

    Args:
        path: path or URL. It is a pattern only if there is no file or folder of that name.
        suffixes: suffixes of the files to read, such as ".jsonl".

    Raises:
        DataError: if there is no file to read.
    """
    if not path:
        raise DataError("give a file, a folder, a pattern or a URL")
    try:
        listed = _list_url(path) if "://" in path else _list_local(path)
    except DataError:
        raise
    except Exception as error:  # the file system may raise anything
        raise DataError(f"cannot be listed: {type(error).__name__}: {error}") from error
    if isinstance(listed, str):
        return DataFiles([listed])
    any_kind = listed.is_pattern and not any(f.path.endswith(suffixes) for f in listed.files)
    found = DataFiles()
    if listed.folders:
        found.skipped[_FOLDERS] = [f"{folder}/" for folder in listed.folders]
    for file in listed.files:
        if file.hidden:
            found.skipped.setdefault(_HIDDEN, []).append(file.name)
        elif not (any_kind or file.path.endswith(suffixes)):
            found.skipped.setdefault(_OTHER, []).append(file.name)
        elif file.size == 0:
            found.skipped.setdefault(_EMPTY, []).append(file.name)
        else:
            found.read.append(file.path)
    found.read.sort()
    if not found.read:
        kind = "pattern" if listed.is_pattern else "folder"
        skipped = f": {found.warning()}" if found.skipped else ""
        raise DataError(f"the {kind} has no file to read ({', '.join(suffixes)}){skipped}")
    return found


def check_documents(
    files: DataFiles, read: Callable[[str, str], Iterator[Document]], text_key: str
) -> None:
    """Check that local files have at least one document, by reading the first.

    Raises:
        DataError: if there is no document.
        RecordError: as :func:`.records.read_documents`.
    """
    if next((document for file in files.read for document in read(file, text_key)), None) is None:
        size = sum(Path(file).stat().st_size for file in files.read)
        raise DataError(
            f"there is no document in {files} of {size:,} bytes: all records have an empty text in "
            f"the field {text_key!r}, or there are no records"
        )


def _list_local(path: str) -> "str | _Listed":
    if Path(path).is_dir():
        return _Listed(_walk(path))
    if Path(path).exists():
        return path
    matches = glob.glob(path, recursive=True) if glob.has_magic(path) else []  # noqa: PTH207
    files, folders = [], []
    by_folder: dict[str, str] = {}  # real path of a folder -> the name that it is read by
    for match in sorted(matches, key=lambda name: (len(name), name)):  # a link may lead back
        parent = os.path.dirname(match)  # noqa: PTH120
        if Path(match).is_dir():
            folders.append(match)
        elif by_folder.setdefault(os.path.realpath(parent), parent) == parent:
            files.append(_File(match, match, _size(match)))
    listed = _of_pattern(path, files, len(matches))
    return listed if "**" in path else listed._replace(folders=folders)


def _of_pattern(pattern: str, files: list[_File], matches: int) -> _Listed:
    if not glob.has_magic(pattern):
        raise DataError("no such file or folder")
    if not files:
        raise DataError(f"the pattern matches {'only folders' if matches else 'nothing'}")
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    if not any(part.startswith((".", "_")) for part in pattern[len(fixed) :].split("/")):
        files = [f._replace(hidden=_is_hidden(f.name[len(fixed) :])) for f in files]
    return _Listed(files, is_pattern=True)


def _is_hidden(name: str) -> bool:
    *folders, file = name.split("/")
    return file.startswith(".") or any(folder.startswith((".", "_")) for folder in folders)


def _walk(top: str) -> list[_File]:
    """List the files below a folder, and hidden folders; each real folder is listed once."""
    files: list[_File] = []
    seen, folders = set(), [top]
    while folders:  # links come after the folders, because they may lead back to them
        for folder, inner, names in os.walk(folders.pop(0), onerror=_refuse):
            inner.sort()
            real = os.path.realpath(folder)
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            for name in names:
                path = os.path.join(folder, name)  # noqa: PTH118
                below = os.path.relpath(path, top)
                files.append(_File(path, below, _size(path), name.startswith(".")))
            for name in list(inner):
                path = os.path.join(folder, name)  # noqa: PTH118
                if name.startswith((".", "_")):
                    files.append(_File(path, os.path.relpath(path, top) + "/", None, hidden=True))
                    inner.remove(name)
                elif Path(path).is_symlink():
                    folders.append(path)
    return files


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}")


def _size(path: str) -> int | None:
    """Return the size of a file; None for a broken link, which fails when it is read."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _list_url(url: str) -> "str | _Listed":
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    fs, path = url_to_fs(url)
    if isinstance(fs, LocalFileSystem):
        return _list_local(path)
    # On the hub, do not ask for the last commit of each file, because that is slow.
    options: dict[str, Any] = {"expand_info": False} if "hf" in fs.protocol else {}
    try:
        kind = fs.info(path)["type"]
    except FileNotFoundError:
        kind = "pattern"
    if kind == "file":
        return url
    found = (fs.find if kind == "directory" else fs.glob)(path, detail=True, **options)
    infos = [(name, info) for name, info in found.items() if info["type"] != "directory"]
    files = [_File(fs.unstrip_protocol(name), name, info.get("size")) for name, info in infos]
    if kind == "pattern":
        return _of_pattern(path, files, len(found))
    below = [file.name[len(path) :].lstrip("/") for file in files]
    return _Listed(
        [f._replace(name=n, hidden=_is_hidden(n)) for f, n in zip(files, below, strict=True)]
    )


def _kind(file: str) -> str:
    """Return the suffix that tells the kind of a file."""
    name = file.rpartition("/")[2]
    known = next((suffix for suffix in JSONL + PARQUET if name.endswith(suffix)), None)
    return known or Path(name).suffix or "without a suffix"
