"""Make a corpus from text files on this machine, with its own tokenizer, for replicate.py.

    python scripts/make_corpus.py rfc outputs/replication/prose --source FOLDER
    python scripts/make_corpus.py python outputs/replication/packages --vocab-size 4096

rfc: English prose, the paragraphs of the RFCs in FOLDER (rfc*.txt or rfc*.txt.gz). Lists, tables,
diagrams, and paragraphs that an earlier RFC has are skipped. Debian has the RFCs in packages
doc-rfc-* (non-free); the RFC editor offers them for download.
python: the sources of this interpreter's library and of all installed packages.

The corpus is a folder of train.jsonl, validation.jsonl (5 % of the files), tokenizer/ (byte-level
BPE), tokens/ (token shards) and made_from.json. It needs the extra "data".
"""

import argparse
import gzip
import importlib.util
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from command_line import documented_parser
from torchtitan.experiments.tst.data.demo_corpus import (
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    make_corpus,
    read_texts,
    tokenize_corpus,
)
from torchtitan.experiments.tst.data.errors import DataError
from torchtitan.experiments.tst.errors import ArgumentError
from torchtitan.experiments.tst.resilience.reporting import errors_in_one_line

# the last line of a page, the first of the next, and the first character after them
_PAGE_BREAK = re.compile(r"\s*\n[^\n]*\[Page \w+\]\s*\n\s*RFC \d+[^\n]*\n\s*?\n( *\S)")
_LETTERS = 0.93  # share of letters and spaces in a paragraph of prose
_RFC = re.compile(r"(rfc\d+)\.txt(\.gz)?")
_SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # an entry for every byte
MADE_FROM = "made_from.json"


def read_rfcs(folder: Path) -> Iterator[str]:
    """Yield the prose of each RFC below ``folder``, a paragraph a line.

    Raises:
        DataError: if there is no RFC.
    """
    found = [(path, _RFC.fullmatch(path.name)) for path in sorted(folder.rglob("rfc*.txt*"))]
    files = {name[1]: path for path, name in found if name}
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
        continues = page_break[1].strip().islower()
        return ("\n" if continues else "\n\n") + page_break[1]

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
    """Return the folders of this interpreter's library and packages."""
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]


def read_python(folders: Iterable[Path]) -> Iterator[str]:
    """Yield the Python sources below the folders, in the order of their paths; equal files once."""
    seen: set[str] = set()
    for source in read_texts(sorted({path for folder in folders for path in folder.rglob("*.py")})):
        if source and source not in seen:
            seen.add(source)
            yield source


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("kind", choices=["rfc", "python"])
    parser.add_argument(
        "folder", type=Path, help="folder of the corpus; an existing corpus is not made again"
    )
    parser.add_argument("--source", type=Path, help="the folder with the RFCs; for rfc only")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=VOCAB_SIZE,
        help="entries of the tokenizer; default: %(default)s",
    )
    args = parser.parse_args()
    with errors_in_one_line():
        make(args)


def make(args: argparse.Namespace) -> None:
    """Make the missing parts of the corpus.

    Raises:
        ArgumentError: for arguments that do not fit, or a folder with another content.
        DataError: for a source without enough text.
    """
    if args.kind == "rfc" and not args.source:
        raise ArgumentError("--source is missing: give the folder with the RFCs")
    if args.kind == "python" and args.source:
        raise ArgumentError(f"--source {args.source}: only rfc has a source. Remove the option")
    if args.vocab_size < _SMALLEST_VOCABULARY:
        raise ArgumentError(
            f"--vocab-size {args.vocab_size}: must be at least {_SMALLEST_VOCABULARY}, for every "
            "byte and the special tokens"
        )
    if importlib.util.find_spec("datatrove") is None:
        raise ArgumentError('datatrove is missing: pip install "torchtitan-tst[data]"')
    made_from = {"kind": args.kind, "vocab_size": args.vocab_size}
    path = args.folder / MADE_FROM
    if not args.folder.exists():
        sources = read_rfcs(args.source) if args.kind == "rfc" else read_python(python_folders())
        make_corpus(args.folder, sources, args.vocab_size)
        path.write_text(json.dumps(made_from))
    found = json.loads(path.read_text()) if path.exists() else "no corpus of this script"
    if found != made_from:
        raise ArgumentError(f"{args.folder} holds {found}, not {made_from}; give another folder")
    tokenize_corpus(args.folder)


if __name__ == "__main__":
    main()
