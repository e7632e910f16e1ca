"""Recognize files with the wrong content, from broken downloads, clones and copies."""

import re
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_ANNEX = re.compile(rb"[./]*(\.git/)?annex/objects/")
_PAGE = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype\b|html\b|head\b|\?xml\b)", re.I | re.S
)
_START = 1024  # bytes: an LFS pointer is shorter


def what_is_wrong(path: Path) -> str | None:
    """Check by the first bytes of a file that it can be what its name says.

    Args:
        path: path of a tokenizer, weights or another downloaded file.

    Returns:
        What the file is instead and what to do, as a text to put after the file's name. None if
        nothing is wrong. The content is not parsed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            return f"is a link to {path.readlink()}, which does not exist"
        return f"cannot be read: {error.strerror}"
    if not start:
        return "is empty; download it again"
    if not start.strip(b"\0 \t\r\n"):
        return "begins with zeros or blanks only; download it again"
    if start.startswith(_LFS):
        return (
            "is a Git LFS pointer, not the file itself; run `git lfs pull` in "
            f"{path.absolute().parent}, or download it with `tst assets`"
        )
    if _ANNEX.match(start):
        return "is a git-annex pointer, not the file itself; run `git annex get` on it"
    if _PAGE.match(start):
        return (
            "is a web page (HTML or XML), such as a login page or an error; download the file "
            "again, for example with `tst assets`"
        )
    return None
