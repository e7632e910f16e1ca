"""Files that are not what their name says: what downloads, clones and copies leave behind."""

import re
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_ANNEX = re.compile(rb"[./]*(\.git/)?annex/objects/")
_PAGE = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype\b|html\b|head\b|\?xml\b)", re.I | re.S
)
_START = 1024  # bytes: an LFS pointer is shorter


def what_is_wrong(path: Path) -> str | None:
    """Recognize a file that cannot be what its name says, by its first bytes.

    Args:
        path: of a tokenizer, weights or another file that people download.

    Returns:
        What it is instead and what to do, to be put after the file's name; None if there is
        nothing to object to. The content is not parsed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            return f"is a link to {path.readlink()}, which does not exist"
        return f"cannot be read: {error.strerror}"
    if not start:
        return "is empty; fetch it again"
    if not start.strip(b"\0 \t\r\n"):
        return "begins with zeros or blanks only; fetch it again"
    if start.startswith(_LFS):
        return (
            "is a Git LFS pointer and not the file itself; run `git lfs pull` in "
            f"{path.absolute().parent}, or fetch it with `tst assets`"
        )
    if _ANNEX.match(start):
        return "is a git-annex pointer and not the file itself; run `git annex get` on it"
    if _PAGE.match(start):
        return (
            "is a web page (HTML or XML), such as a login page or an error; fetch the file again, "
            "for example with `tst assets`"
        )
    return None
