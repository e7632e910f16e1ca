"""Make the demo's corpus and tokenizer from the sources of Python's standard library.

Nothing is downloaded: the text is part of the running Python, about 30 MB if its tests are
installed. Files are cut into pieces, and the pieces are shuffled. Otherwise a batch would hold
consecutive windows of one long file, which hurts small runs.
"""

import json
import random
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..engine import is_03
from .errors import DataError
from .shards.token_shards import CORPUS_FILE
from .shards.tokenization_options import Machine, Options

FOLDER = Path("outputs/demo/corpus")  # the folder that the demo's jobs read
TOKENS = "tokens"  # the folder in it with train.jsonl as token shards
VOCAB_SIZE = 1024  # that of the llama3 flavor "demo"
PIECE_CHARACTERS = 700  # about 256 tokens, one superposition sequence of the demo
VALIDATION_SHARE = 0.05  # of the files
TOKENIZER_CHARACTERS = 4_000_000  # of the text that the tokenizer is trained on
SPECIAL_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def read_sources() -> Iterator[str]:
    """Return the text of the standard library's .py files, in order of their paths."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    return read_texts(path for path in paths if "site-packages" not in path.parts)


def read_texts(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the text of each file that can be read and is valid UTF-8."""
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # some of Python's own tests are not UTF-8
            continue


def cut(source: str) -> Iterator[str]:
    """Yield pieces of whole lines; all except the last have at least PIECE_CHARACTERS."""
    piece, length = [], 0
    for line in source.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= PIECE_CHARACTERS:
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


def train_tokenizer(pieces: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with ``vocab_size`` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    budget = TOKENIZER_CHARACTERS // PIECE_CHARACTERS
    tokenizer.train_from_iterator(pieces[:budget], trainer)
    return tokenizer


def make_corpus(folder: Path, sources: Iterable[str], vocab_size: int = VOCAB_SIZE) -> None:
    """Write train.jsonl, validation.jsonl and tokenizer/ into ``folder``, all of it or nothing.

    Args:
        folder: folder of the corpus; must not exist.
        sources: text of each file; 5 % of the files are held out for validation.
        vocab_size: entries of the tokenizer, which is trained on the training files.

    Raises:
        DataError: if there are fewer than two files.
    """
    shuffle = random.Random(0).shuffle
    sources = list(sources)
    if len(sources) < 2:
        raise DataError(f"{folder}: needs at least 2 source files, found {len(sources)}")
    shuffle(sources)
    n_validation = max(1, round(VALIDATION_SHARE * len(sources)))
    split = {
        "validation": [piece for source in sources[:n_validation] for piece in cut(source)],
        "train": [piece for source in sources[n_validation:] for piece in cut(source)],
    }

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, pieces in split.items():
        shuffle(pieces)
        with (unfinished / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": piece}) + "\n" for piece in pieces)
        print(f"{name}: {len(pieces):,} pieces, {sum(map(len, pieces)) / 1e6:.1f} M characters")
    tokenizer_folder = unfinished / "tokenizer"
    tokenizer_folder.mkdir()
    train_tokenizer(split["train"], vocab_size).save(str(tokenizer_folder / "tokenizer.json"))
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL_TOKENS))
    unfinished.rename(folder)


def make_if_read(job_config: Any) -> None:
    """Make the corpus in ``outputs/demo/corpus`` if a job reads it and it does not exist.

    Args:
        job_config: config of the job, with the paths that it reads.

    Raises:
        ModuleNotFoundError: if the job reads token shards, and the extra ``data`` is not installed.
    """
    corpus, tokens = FOLDER.absolute(), (FOLDER / TOKENS).absolute()
    paths = (
        job_config.model.hf_assets_path,
        job_config.training.dataset_path,
        job_config.validation.dataset_path,
    )
    read = [Path(path).absolute() for path in paths if path]
    if not any(path.is_relative_to(corpus) for path in read):
        return
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER.with_name(f".{FOLDER.name}.lock")):  # several jobs may start at once
        if not FOLDER.exists():
            print("Making the demo corpus from the standard library's sources", flush=True)
            make_corpus(FOLDER, read_sources())
        if tokens in read:
            tokenize_corpus(FOLDER)


def tokenize_corpus(folder: Path) -> None:
    """Tokenize train.jsonl of ``folder`` into ``folder``/tokens, unless that is complete.

    Raises:
        DataError: with TorchTitan 0.3, if it is not.
    """
    if not _is_complete(folder / TOKENS):
        if is_03():
            raise DataError(
                f"{folder / TOKENS} is missing, and token shards are made with TorchTitan 0.2.2; "
                "run `tst check` on this job there once"
            )
        from .shards.executors import tokenize

        options = Options(tokenizer=str(folder / "tokenizer"))
        tokenize(str(folder / "train.jsonl"), folder / TOKENS, options, Machine())


def _is_complete(tokens: Path) -> bool:
    path = tokens / CORPUS_FILE
    try:
        return bool(json.loads(path.read_text())["complete"])
    except FileNotFoundError:
        return False
    except (ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove {tokens}") from error
