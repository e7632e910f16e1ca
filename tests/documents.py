"""Reading the documents: their commands, code, links, paths and keys."""

import re
from pathlib import Path

from jobs import ROOT

PACKAGE = ROOT / "torchtitan/experiments/tst"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(PACKAGE.rglob("README.md")),
]
NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}
TOP_LEVEL = r"(?:torchtitan|train_configs|scripts|tests|docs)/[\w./-]*"


def page(name: str) -> str:
    """Return the text of a page, named from the top of the repository."""
    return (ROOT / name).read_text()


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language, also those with a title."""
    return re.findall(rf"^ *```{language}(?: [^\n]*)?\n(.*?)```", text, re.DOTALL | re.MULTILINE)


def without_blocks(text: str) -> str:
    """Return a page's text without its code blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the command lines of a page, in its bash blocks and in its sentences."""
    lines = [
        line.partition(" #")[0].strip()
        for block in blocks(text, "bash")
        for line in re.sub(r"\\\n *", "", block).splitlines()
    ]
    inline = re.findall(
        r"`((?:python|scripts/|\./)[^`\n]* [^`\n]*|tst [^`\s]+ [^`\n]+|scripts/[\w./]+\.sh)`",
        without_blocks(text),
    )
    return sorted({line for line in [*lines, *inline] if line and not line.startswith("#")})


def table(text: str, header: str) -> str:
    """Return the rows of the table whose first column has the header."""
    _, found, rest = text.partition(f"| {header} |")
    assert found, f"no table of {header}"
    return rest.partition("\n\n")[0].partition("\n")[2].partition("\n")[2]


def paths(text: str) -> set[str]:
    """Return the repository's files and folders that a page names."""
    named = re.findall(rf"`({TOP_LEVEL})`", without_blocks(text))
    for line in commands(text):
        named += re.findall(rf"(?:^|[\s=])({TOP_LEVEL})(?=$|\s)", line)
    return {*named}


def links(text: str) -> list[str]:
    """Return the links that stay within the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", without_blocks(text), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    found: set[str] = set()
    for heading in plain:
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        known, number = name, 0
        while known in found:
            number += 1
            known = f"{name}-{number}"
        found.add(known)
    return found


def keys(text: str) -> set[tuple[str, str]]:
    """Return what looks like a key of a job, as section and key: options and names in backticks."""
    options = re.findall(r"--(?:no-)?([a-z_]+)\.([\w-]+)", text)
    named = re.findall(r"`([a-z]\w*)\.([a-z]\w*)(?: ?=[^`]*)?`", without_blocks(text))
    return {
        (section, key.removeprefix("no-").replace("-", "_")) for section, key in [*options, *named]
    }


def broken_links(path: Path, text: str) -> list[str]:
    """Return the links of a page that lead to no file or to no heading."""
    broken = []
    for link in links(text):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken
