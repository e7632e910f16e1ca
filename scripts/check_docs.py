"""Check that the docs are easy to read: short sentences, and have none of the phrases to avoid.

A page is README.md, any other Markdown file of the repository, or a template of docs/results.md and
docs/experiments.md. Its sentences have at most 17 words in the mean; tables, code and headings do
not count. The phrases to avoid are searched for in the pages, and in the texts, comments and
docstrings of the package, the scripts, the examples and the job configs, too.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from command_line import documented_parser

ROOT = Path(__file__).resolve().parents[1]
MEAN_WORDS = 17
AVOID = (
    r"comes? to\b(?! light)",  # costs, is, estimates
    r"go(?:es)? on\b",  # continues, resumes
    r"gone on\b",  # continued, resumed
    r"left out\b",  # skipped, without
    r"in the place of\b",  # instead of
    r"but for\b",  # except
    r"compose[sd]? with\b",  # works with
    r"ma[dk]e?s? up for\b",  # has a workaround for
    r"(?:is|are|was|were|be|been) held to\b",  # is tested against
    r"beside\b",  # next to, and
    r"(?:of|to|in|from|by|for|with|on|at|after|until) which\b",  # two sentences
    r"for all that\b",  # for everything that
)
PHRASES = re.compile(rf"\b(?:{'|'.join(AVOID)})".replace(" ", r"[\s#>]+"), re.IGNORECASE)
ADVICE = "say it in plain words; CONTRIBUTING.md has some"
SOURCES = ("torchtitan", "scripts", "docs/examples", "train_configs", "run_train.sh", ".ci/run")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|vs|cf|Fig|Eq|approx|etc)\.", re.IGNORECASE)
NOT_PROSE = re.compile(
    r"^```.*?^```[^\n]*$|^<!--.*?-->|^\{[%#].*?[%#]\}$|^---\n.*?^---$", re.MULTILINE | re.DOTALL
)


class Finding(NamedTuple):
    """A text to mend, and why."""

    path: Path
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.why}"


def prose(markdown: str) -> list[str]:
    """Return the paragraphs and list items of a page, as plain text."""
    text = NOT_PROSE.sub("", markdown)
    text = re.sub(r"\{\{.*?\}\}", "0", text, flags=re.DOTALL)  # a figure of a template
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    kept = [
        line
        for line in text.splitlines()
        if not line.lstrip().startswith(("#", "|", "<", "!!!", "===", ":::"))
    ]
    items = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n\n", "\n".join(kept), flags=re.MULTILINE)
    parts = re.split(r"\n\s*\n", items)
    return [" ".join(part.split()) for part in parts if re.search(r"[a-z]", part)]


def sentences(markdown: str) -> list[str]:
    """Return the sentences of a page; a colon or a semicolon does not end one."""
    found = []
    for part in prose(markdown):
        part = ABBREVIATION.sub(r"\1", part.replace("**", "").replace("*", ""))
        found += re.split(r"(?<=[.!?])[\"')]*\s+", part)
    return [sentence for sentence in found if re.search(r"[A-Za-z]", sentence)]


def mean_words(markdown: str) -> float:
    """Return the mean number of words in a sentence of the page; 0 without any."""
    lengths = [len(sentence.split()) for sentence in sentences(markdown)]
    return sum(lengths) / len(lengths) if lengths else 0.0


def phrases(path: Path) -> list[Finding]:
    """Return the phrases to avoid that a file has, also across lines."""
    text = path.read_text()
    if path.suffix == ".md":  # CONTRIBUTING.md quotes them
        text = re.sub(r"`[^`\n]*`", lambda match: "`" * len(match[0]), text)
    return [
        Finding(path, text.count("\n", 0, match.start()) + 1, f"{match[0]!r}: {ADVICE}")
        for match in PHRASES.finditer(text)
    ]


def tracked(*paths: str) -> list[Path]:
    """Return the files below the paths that git knows or could add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *paths]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = (ROOT / name for name in sorted({*names.splitlines()}))
    return [path for path in files if path.is_file() and path.suffix != ".csv"]


def main(arguments: list[str] | None = None) -> int:
    """Print what to mend; return the exit code."""
    parser = documented_parser(__doc__)
    parser.add_argument("--means", action="store_true", help="print the mean of each page, too")
    args = parser.parse_args(arguments)
    found, pages = [], tracked("*.md")
    for path in pages:
        mean = mean_words(path.read_text())
        if args.means:
            print(f"{mean:5.1f} words in a sentence of {path.relative_to(ROOT)}")
        if mean > MEAN_WORDS:
            why = f"sentences have {mean:.1f} words in the mean, at most {MEAN_WORDS} are allowed"
            found.append(Finding(path, 1, why))
    for path in dict.fromkeys([*pages, *tracked(*SOURCES)]):
        if path != Path(__file__).resolve():
            found += phrases(path)
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
