"""Makes the small corpus, with token shards: ``FOLDER``. It runs with TorchTitan 0.2.2."""

import sys
import sysconfig
from pathlib import Path

from corpora import tokenize
from torchtitan.experiments.tst.data.demo_corpus import make_corpus
from torchtitan.experiments.tst.data.shards.tokenization import Options


def main() -> None:
    """Make the corpus of the fixture of the same name for 0.2.2, with text/ for TorchTitan 0.3."""
    folder = Path(sys.argv[1])
    making = folder.with_name("making")
    library = Path(sysconfig.get_path("stdlib"))
    make_corpus(making, [path.read_text() for path in sorted(library.glob("[a-h]*.py"))])
    options = Options(tokenizer=str(making / "tokenizer"), shuffle="none")
    tokenize(making / "train.jsonl", making / "tokens", options)
    (making / "text").mkdir()
    (making / "text/train.jsonl").symlink_to("../train.jsonl")
    making.rename(folder)


if __name__ == "__main__":
    main()
