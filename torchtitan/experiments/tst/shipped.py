"""The files that users copy: the job configs, and ``core`` for use without TorchTitan."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import tomli

NAME = "train_configs"
LICENSE = "LICENSE"
ORIGIN = "ORIGIN.txt"  # of a copy of core: its version, and the checksums of its files
_PACKAGE = Path(__file__).parent
_FOLDERS = ("demo", "debug", "paper")
_DISTRIBUTION = "torchtitan-tst"
_ENTRY = re.compile(r"^([0-9a-f]{64})  ((?:\w+/)*\w+\.py|LICENSE)$", re.MULTILINE)
_INCOMPLETE = "# This copy is incomplete. Run `tst core copy` again.\n"
_HOW_TO_UPDATE = f"""
# `sha256sum --check {ORIGIN}` shows which files have changed since then.
# To update the copy, install another version and run the command again. It replaces the files
# below if none of them has changed.
"""


def shipped_configs() -> Iterator[tuple[Path, str]]:
    """Yield the path of each config, below train_configs, and the first sentence of its comment.

    Raises:
        FileNotFoundError: if this copy of the package has no configs.
    """
    folder = _folder()
    for name in _FOLDERS:
        for path in sorted(folder.joinpath(name).rglob("*.toml")):
            comment = path.read_text().partition("\n\n")[0].replace("\n# ", " ")
            yield path.relative_to(folder), comment.removeprefix("# ").partition(". ")[0]


def copy_configs(folder: Path) -> list[Path]:
    """Copy the configs to FOLDER/train_configs. Nothing is written if one of them is refused.

    Raises:
        FileExistsError: if a file exists already and differs, or if the folder is none.
        FileNotFoundError: if this copy of the package has no configs.
    """
    source = _folder()
    content = {folder / NAME / path: (source / path).read_text() for path, _ in shipped_configs()}
    _refuse_changes(folder, content, {})
    _write(folder, _differing(content))
    return list(content)


def copy_core(folder: Path) -> tuple[str, list[Path]]:
    """Copy ``core`` with its licence and its origin into a folder.

    The files are those of the package, byte for byte. The file ``ORIGIN.txt`` says where they are
    from. Files of an earlier copy are replaced, or removed if they no longer exist. Nothing is
    written if one of them has changed. After an interruption, this or another version of the
    package completes the copy.

    Args:
        folder: the new package, such as ``my_project/tst_core``.

    Returns:
        The version of the package, and the modules of the copy.

    Raises:
        FileExistsError: if a file exists already, differs, and is not that of an earlier copy, or
            if the folder is none.
        FileNotFoundError: if this copy of the package has no licence.
    """
    version, urls, licence = _release()
    source = _PACKAGE / "core"
    modules = {
        folder / path.relative_to(source): path.read_text("utf-8")
        for path in sorted(source.rglob("*.py"))
    }
    content = modules | {folder / LICENSE: licence}
    lines = [f"# Copied by `tst core copy` from core of {_DISTRIBUTION} {version}."]
    lines += [f"# {url}" for url in urls]
    sums = {path: {_checksum(text)} for path, text in content.items()}
    origin = "\n".join(lines) + _HOW_TO_UPDATE + _entries(folder, sums)
    earlier = _earlier_copy(folder)
    at = folder / ORIGIN
    files = content | dict.fromkeys(earlier.keys() - content.keys() - {at})
    _refuse_changes(folder, files | {at: origin}, earlier)
    changes = _differing(files)
    if changes or _differing({at: origin}):
        # While files are replaced, the origin knows both versions of them.
        earlier.pop(at, None)
        partial = _INCOMPLETE + origin + _entries(folder, earlier)
        _write(folder, [(at, partial), *changes, (at, origin)])
    return version, list(modules)


def _refuse_changes(
    folder: Path, content: Mapping[Path, str | None], earlier: Mapping[Path, set[str]]
) -> None:
    """Refuse to write text files, and to remove those whose text is None, if a user's would go.

    Args:
        folder: folder of the files.
        content: text of each file.
        earlier: checksums of each file that an earlier copy wrote.

    Raises:
        FileExistsError: if a file exists already, differs, and is not that of the earlier copy, or
            if the folder is none.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise FileExistsError(f"FOLDER {folder}: {place} is not a folder; give another FOLDER")
    for path, text in _differing(content):
        if path.is_symlink():
            raise FileExistsError(f"{path} is a symbolic link; remove it, or give another folder")
        found = path.read_text("utf-8", "replace") if path.exists() else text
        if found is None or found == text or _checksum(found) in earlier.get(path, ()):
            continue
        if path in earlier:
            raise FileExistsError(
                f"{path} has changed since it was copied; copy to another folder, and move your "
                "changes there"
            )
        raise FileExistsError(
            f"{path} exists already and differs from the package's; give another folder"
        )


def _differing(content: Mapping[Path, str | None]) -> list[tuple[Path, str | None]]:
    """Return the files that must be written, or removed if their text is None."""

    def differs(path: Path, text: str | None) -> bool:
        if text is None:
            return os.path.lexists(path)
        return not path.is_file() or path.read_bytes() != text.encode()

    return [(path, text) for path, text in content.items() if differs(path, text)]


def _write(folder: Path, changes: list[tuple[Path, str | None]]) -> None:
    """Write text files of a folder in this order; remove those whose text is None.

    All texts are written to temporary files before the first file is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=folder) as new:
        for number, (path, text) in enumerate(changes):
            if text is not None:
                Path(new, str(number)).write_text(text, "utf-8", newline="\n")
                path.parent.mkdir(parents=True, exist_ok=True)
        for number, (path, text) in enumerate(changes):
            if text is None:
                path.unlink()
            else:
                Path(new, str(number)).replace(path)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _entries(folder: Path, sums: Mapping[Path, set[str]]) -> str:
    """Return a line for each checksum, as sha256sum writes it."""
    return "".join(
        f"{checksum}  {path.relative_to(folder).as_posix()}\n"
        for path, checksums in sums.items()
        for checksum in sorted(checksums)
    )


def _earlier_copy(folder: Path) -> dict[Path, set[str]]:
    """Return the checksums of the files of an earlier copy of ``core``; none without a copy."""
    path = folder / ORIGIN
    origin = path.read_text("utf-8", "replace") if path.is_file() else ""
    sums: dict[Path, set[str]] = {}
    for checksum, name in _ENTRY.findall(origin):
        sums.setdefault(folder / name, set()).add(checksum)
    return sums | {path: {_checksum(origin)}} if sums else {}


def _release() -> tuple[str, list[str], str]:
    """Return the version, the URLs and the licence of a checkout or of an installed package."""
    checkout = _PACKAGE.parents[2]
    if (path := checkout / "pyproject.toml").is_file():
        project = tomli.loads(path.read_text("utf-8")).get("project", {})
        if project.get("name") == _DISTRIBUTION:
            urls = [f"{label}, {url}" for label, url in project.get("urls", {}).items()]
            return project["version"], urls, (checkout / LICENSE).read_text("utf-8")
    try:
        installed = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        licence = None
    else:
        licence = installed.read_text(f"licenses/{LICENSE}")
    if licence is None:
        raise FileNotFoundError(
            "this copy of torchtitan.experiments.tst has no licence; install it with "
            "`pip install torchtitan-tst`"
        )
    return installed.version, installed.metadata.get_all("Project-URL") or [], licence


def _folder() -> Path:
    """Return the folder of the configs: inside an installed package, next to it in a checkout."""
    for folder in (_PACKAGE / NAME, _PACKAGE.parents[2] / NAME):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        "this copy of torchtitan.experiments.tst has no job configs; install them with "
        "`pip install torchtitan-tst`"
    )
