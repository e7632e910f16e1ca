"""Make a corpus of text files on this machine, with a tokenizer of its own, for replicate.py.

    python scripts/make_corpus.py rfc outputs/replication/prose --source FOLDER
    python scripts/make_corpus.py python outputs/replication/packages --vocab-size 4096

rfc: English prose, the paragraphs of the RFCs in FOLDER (rfc*.txt or rfc*.txt.gz). Lists, tables
and diagrams are skipped, and so is a paragraph that another RFC has, too. Debian packages the RFCs
as doc-rfc-* (non-free); the RFC editor offers them for download.
python: the sources of all packages that this interpreter has installed, and of its library.

The corpus is a folder of train.jsonl, validation.jsonl (5 % of the files), tokenizer/ (byte-level
BPE) and tokens/ (token shards).
"""

import argparse
import gzip
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from command_line import documented_parser
from torchtitan.experiments.tst.data.demo_corpus import (
    VOCAB_SIZE,
    make_corpus,
    tokenize_corpus,
)
from torchtitan.experiments.tst.data.errors import DataError
from torchtitan.experiments.tst.errors import ArgumentError
from torchtitan.experiments.tst.resilience.reporting import errors_in_one_line

# the last line of a page, the first of the next, and the first character after them
_PAGE_BREAK = re.compile(r"\s*\n[^\n]*\[Page \w+\]\s*\n\s*RFC \d+[^\n]*\n\s*?\n( *\S)")
_LETTERS = 0.93  # share of letters and spaces in a paragraph of prose


def read_rfcs(folder: Path) -> Iterator[str]:
    """Yield the prose of each RFC below ``folder``, a paragraph a line.

    Raises:
        DataError: if there is no RFC.
    """
    files = {path.name.partition(".")[0]: path for path in sorted(folder.rglob("rfc[0-9]*.txt*"))}
    if not files:
        raise DataError(f"{folder} has no file rfcNUMBER.txt or rfcNUMBER.txt.gz")
    seen: set[str] = set()
    for path in files.values():
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        paragraphs = [p for p in prose(content.decode(errors="replace")) if p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            yield "".join(f"{paragraph}\n" for paragraph in paragraphs)


def prose(text: str) -> Iterator[str]:
    """Yield the paragraphs of an RFC that are sentences of English, each on one line."""

    def joined(page_break: re.Match[str]) -> str:
        goes_on = page_break[1].strip().islower()
        return ("\n" if goes_on else "\n\n") + page_break[1]

    text = _PAGE_BREAK.sub(joined, text).replace("\f", "")
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").splitlines()
        indents = {len(line) - len(line.lstrip()) for line in lines}
        paragraph = " ".join(block.split())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        if (
            len(lines) > 1
            and len(indents) == 1
            and letters >= _LETTERS * len(paragraph)
            and paragraph[0] in '"(' + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
            and paragraph[-1] in '.:?!)"'
        ):
            yield paragraph


def python_folders() -> list[Path]:
    """Return where this interpreter has its library and its packages."""
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]


def read_python(folders: Iterable[Path]) -> Iterator[str]:
    """Yield the Python sources below the folders, in order of their paths; equal files once."""
    seen: set[str] = set()
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        try:
            source = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if source and source not in seen:
            seen.add(source)
            yield source


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("kind", choices=["rfc", "python"])
    parser.add_argument("folder", type=Path, help="of the corpus; what it has is not made again")
    parser.add_argument("--source", type=Path, help="rfc: the folder of the RFCs")
    parser.add_argument(
        "--vocab-size", type=int, default=VOCAB_SIZE, help="of the tokenizer; default: %(default)s"
    )
    args = parser.parse_args()
    with errors_in_one_line():
        make(args)


def make(args: argparse.Namespace) -> None:
    """Make what is missing of the corpus."""
    if (args.kind == "rfc") != (args.source is not None):
        raise ArgumentError(f"--source: {args.source}; give it for rfc, and only there")
    if not args.folder.exists():
        sources = read_rfcs(args.source) if args.kind == "rfc" else read_python(python_folders())
        make_corpus(args.folder, sources, args.vocab_size)
    tokenize_corpus(args.folder)


if __name__ == "__main__":
    main()
