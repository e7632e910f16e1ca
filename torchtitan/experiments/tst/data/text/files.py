"""Which files a path, a pattern or a URL of a text corpus stands for, and which are left out."""

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
_NAMES = 3  # of the files left out, in a message


@dataclass
class DataFiles:
    """The files of a corpus.

    Attributes:
        read: paths or URLs, sorted.
        left_out: files and folders (which end in "/"), by the reason.
    """

    read: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """How many files there are, of each kind."""
        kinds = Counter(_kind(file) for file in self.read)
        count = f"{len(self.read):,} file{'s' * (len(self.read) != 1)}"
        return f"{count} ({', '.join(f'{n:,} {kind}' for kind, n in sorted(kinds.items()))})"

    def checksum(self) -> str:
        """XXH3-64 of the names, below the folder of all, and sizes of local files, hexadecimal.

        A position in the data counts documents of these files, in this order.
        """
        top = os.path.commonpath(self.read)
        listed = [(os.path.relpath(path, top), Path(path).stat().st_size) for path in self.read]
        return xxhash.xxh3_64_hexdigest(json.dumps(listed).encode())

    def warning(self) -> str:
        """What was left out and why; empty if nothing was."""
        count = sum(map(len, self.left_out.values()))
        parts = [
            f"{len(names):,} {reason} ({', '.join(sorted(names)[:_NAMES])}"
            f"{', ...' if len(names) > _NAMES else ''})"
            for reason, names in sorted(self.left_out.items())
        ]
        return f"{count:,} left out: {'; '.join(parts)}" if count else ""


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
    """List the files that a file, a folder, a pattern or a URL of these stands for.

    A file that is named is read whatever it is. In a folder, those with one of the suffixes are
    read, at any depth; hidden ones (their name, or that of a folder above them, begins with "."; or
    with "_" for a folder) and those without a byte are left out. Of the matches of a pattern, too,
    but all kinds are read if none has one of the suffixes.

    Args:
        path: taken for a pattern only where there is no file or folder of that name.
        suffixes: of the files to read, such as ".jsonl".

    Raises:
        DataError: if there is none.
    """
    if not path:
        raise DataError("give a file, a folder, a pattern or a URL")
    try:
        listed = _list_url(path) if "://" in path else _list_local(path)
    except DataError:
        raise
    except Exception as error:  # whatever the file system may raise
        raise DataError(f"cannot be listed: {type(error).__name__}: {error}") from error
    if isinstance(listed, str):
        return DataFiles([listed])
    any_kind = listed.is_pattern and not any(f.path.endswith(suffixes) for f in listed.files)
    found = DataFiles()
    if listed.folders:
        found.left_out[_FOLDERS] = [f"{folder}/" for folder in listed.folders]
    for file in listed.files:
        if file.hidden:
            found.left_out.setdefault(_HIDDEN, []).append(file.name)
        elif not (any_kind or file.path.endswith(suffixes)):
            found.left_out.setdefault(_OTHER, []).append(file.name)
        elif file.size == 0:
            found.left_out.setdefault(_EMPTY, []).append(file.name)
        else:
            found.read.append(file.path)
    found.read.sort()
    if not found.read:
        kind = "pattern" if listed.is_pattern else "folder"
        left_out = f": {found.warning()}" if found.left_out else ""
        raise DataError(f"the {kind} has no file to read ({', '.join(suffixes)}){left_out}")
    return found


def check_documents(
    files: DataFiles, read: Callable[[str, str], Iterator[Document]], text_key: str
) -> None:
    """Check that local files have a document, reading as far as the first.

    Raises:
        DataError: if there is none.
        RecordError: as :func:`.records.read_documents`.
    """
    if next((document for file in files.read for document in read(file, text_key)), None) is None:
        size = sum(Path(file).stat().st_size for file in files.read)
        raise DataError(
            f"there is no document in {files} of {size:,} bytes: no record whose text, in its "
            f"field {text_key!r}, is not empty"
        )


def _list_local(path: str) -> "str | _Listed":
    if Path(path).is_dir():
        return _Listed(_walk(path))
    if Path(path).exists():
        return path
    matches = glob.glob(path, recursive=True) if glob.has_magic(path) else []  # noqa: PTH207
    files, folders = [], []
    by_folder: dict[str, str] = {}  # of each real folder the name that it is read by
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
    """Files below a folder, each real folder once, and hidden folders."""
    files: list[_File] = []
    seen, folders = set(), [top]
    while folders:  # links to folders after the folders: they may lead back
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
    """Return the size of a file; None for a broken link, which is an error when it is read."""
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
    # of the hub: not the last commit of each file, which takes long
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
    """The suffixes of a file's name, without what is part of the name."""
    name = file.rpartition("/")[2]
    known = next((suffix for suffix in JSONL + PARQUET if name.endswith(suffix)), None)
    return known or Path(name).suffix or "without a suffix"
