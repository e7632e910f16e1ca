"""Read a folder of token shards as one sequence of token ids.

The format is datatrove's:

- ``NAME.ds`` has the token ids, 2 or 4 bytes each (little endian).
- ``NAME.ds.index`` has the end of each document in tokens, 8 bytes each.
- ``NAME.ds.metadata`` has the name of the tokenizer, the bytes of a token and the number of tokens.

A folder of ``tst tokenize`` also has ``corpus.json``, which says whether the folder is complete.
"""

import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash
from torchtitan.components.tokenizer import BaseTokenizer

from ...errors import UserError
from ..tokenizer_identity import checksum, checksum_in, entries

CORPUS_FILE = "corpus.json"
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_THREADS = 32  # that check files: on a cluster's file system, each file takes a while
_BATCH = 64  # files that a thread checks at a time
_SAMPLE, _SAMPLE_TOKENS = 256, 2**16  # shards whose ids are checked if the tokenizer is unknown


class ShardError(UserError, ValueError):
    """Token shards that cannot be used for training; the message names the file."""


class Shard(NamedTuple):
    """A shard whose three files agree."""

    path: Path
    tokens: int
    token_bytes: int
    tokenizer: str  # the name in its metadata


class TokenShards:
    """An endless sequence of tokens: the shards in the order of their names, repeated.

    The constructor opens the index and the metadata of every shard. A launch does this once, with
    :func:`.once.once_in_launch`. The object is small, and can be pickled without open files.

    Args:
        folder: folder with the shards.
        tokenizer: tokenizer of the run; the shards must be made with it. None skips the check.

    Attributes:
        name: name of the folder.
        tokens: number of tokens in all shards.
        vocabulary: one more than the highest id that is allowed.
        same_tokenizer: whether the shards are known to be made with the run's tokenizer.

    Raises:
        ShardError: if a shard is damaged, incomplete or made with another tokenizer.
    """

    def __init__(self, folder: str | Path, tokenizer: BaseTokenizer | None = None):
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        listed = _listed_shards(self.folder)
        shards = read_shards(self.folder)
        if listed is not None:
            _check_listed(self.folder, shards, listed)
        _check_alike(shards)
        _, _, self._token_bytes, self._tokenizer = shards[0]
        # Arrays save memory: there may be 100,000 shards, in each process of each rank.
        self._names = np.array([os.fsencode(shard.path.name) for shard in shards])
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)
        self.tokens = int(self._starts[-1])
        self.vocabulary, self.same_tokenizer = 2**32, False
        if tokenizer:
            self._check_tokenizer(tokenizer)

    def read(self, position: int, count: int) -> np.ndarray:
        """Read ``count`` tokens from ``position`` of the endless sequence, int64 (count,).

        Raises:
            ShardError: if a shard cannot be read, or has an id that is not in the vocabulary.
        """
        tokens, filled = np.empty(count, np.int64), 0
        while filled < count:
            at = (position + filled) % self.tokens
            number = int(np.searchsorted(self._starts, at, "right")) - 1
            start, end = self._starts[number : number + 2].tolist()
            part = self._read_shard(number, at - start, min(count - filled, end - at))
            tokens[filled : filled + len(part)] = part
            filled += len(part)
        return tokens

    def checksum(self) -> str:
        """Return an XXH3-64 checksum of names, sizes and some tokens of the shards, hexadecimal.

        The tokens are those at the beginning of the first and of the last shard.
        """
        content = xxhash.xxh3_64()
        sizes = np.diff(self._starts).tolist()
        for name, tokens in zip(self._names.tolist(), sizes, strict=True):
            content.update(b"%b %d %d\n" % (name, tokens, self._token_bytes))
        for number in (0, len(sizes) - 1):
            content.update(self._read_shard(number, 0, min(sizes[number], 2**16)).tobytes())
        return content.hexdigest()

    def _read_shard(self, number: int, start: int, count: int) -> np.ndarray:
        """Read ``count`` tokens of a shard, in the shard's dtype."""
        path = self._path(number)
        tokens = np.empty(count, _DTYPES[self._token_bytes])
        rest, offset = tokens.view(np.uint8).data, start * self._token_bytes
        try:
            file = _open(path)
            while len(rest):
                read = os.preadv(file.fileno(), [rest], offset)
                if not read:
                    raise OSError(f"it ends at byte {offset:,}, before token {start + count:,}")
                rest, offset = rest[read:], offset + read
        except OSError as error:  # removed, or shorter than before
            raise ShardError(f"{path} cannot be read any more: {error}") from error
        self._check_ids(path, start, tokens)
        return tokens

    def _path(self, number: int) -> Path:
        return self.folder / os.fsdecode(self._names[number])

    def _check_tokenizer(self, tokenizer: BaseTokenizer) -> None:
        """Check that the shards were made with the run's tokenizer, as far as they say so."""
        self.vocabulary = entries(tokenizer)
        if theirs := checksum_in(self._tokenizer):
            if theirs != (ours := checksum(tokenizer)):
                raise ShardError(
                    f"{self._path(0)} was made with another tokenizer than the run's: "
                    f"{self._tokenizer}, but the run's has checksum {ours}; set "
                    "model.hf_assets_path to the tokenizer of the shards, or tokenize again"
                )
            self.same_tokenizer = True
        elif self._token_bytes == 2 and self.vocabulary > 2**16:
            raise ShardError(
                f"{self._path(0)} has 2 bytes a token, too few for the {self.vocabulary:,} entries "
                "of the run's tokenizer (model.hf_assets_path), so it was made with another: "
                f"{self._tokenizer}"
            )
        else:
            sizes = np.diff(self._starts)
            sample = np.linspace(0, len(sizes) - 1, min(len(sizes), _SAMPLE))
            for number in sample.round().astype(int).tolist():
                self._read_shard(number, 0, min(int(sizes[number]), _SAMPLE_TOKENS))

    def _check_ids(self, path: Path, start: int, tokens: np.ndarray) -> None:
        """Check that token ids are in the vocabulary."""
        if (highest := tokens.max()) >= self.vocabulary:
            where = start + int(tokens.argmax())
            raise ShardError(
                f"{path} has token id {highest} at token {where}, but the run's tokenizer "
                f"(model.hf_assets_path) has {self.vocabulary:,} entries, so the shards were made "
                f"with another: {self._tokenizer}"
            )


@functools.lru_cache(maxsize=16)
def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def read_shards(folder: Path) -> list[Shard]:
    """Check the shards of a folder, and return them in the order of their names.

    Raises:
        ShardError: if there are none, or one is damaged.
    """
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder (of token shards, *.ds); see `tst tokenize`")
    paths = sorted(folder.glob("*.ds"), key=lambda path: path.name)
    batches = [paths[begin : begin + _BATCH] for begin in range(0, len(paths), _BATCH)]
    with ThreadPoolExecutor(_THREADS, "check-shards") as threads:
        checked = threads.map(lambda batch: list(map(_check_shard, batch)), batches)
        # datatrove writes an empty shard for a task without documents.
        shards = [shard for batch in checked for shard in batch if shard.tokens]
    if not shards:
        raise ShardError(f"{folder} has no token shards (*.ds), or only empty ones")
    return shards


def _check_listed(folder: Path, shards: list[Shard], listed: dict[str, int]) -> None:
    """Check that a folder has exactly the shards that ``corpus.json`` lists."""
    found = {shard.path.name: shard.tokens for shard in shards}
    for name in sorted({*listed, *found}):
        if listed.get(name) != found.get(name):
            raise ShardError(
                f"{folder / name} has {found.get(name, 'no')} tokens, but {CORPUS_FILE} in the "
                f"same folder says {listed.get(name, 'none')}; copy the folder again, or remove "
                "shards of another corpus"
            )


def _check_alike(shards: list[Shard]) -> None:
    """Check that all shards have the same width and the same tokenizer."""
    first = shards[0]
    for shard in shards:
        for what in ("token_bytes", "tokenizer"):
            if getattr(shard, what) != getattr(first, what):
                raise ShardError(
                    f"{shard.path} has {what} = {getattr(shard, what)!r} in its metadata, but "
                    f"{first.path.name} has {getattr(first, what)!r}; use one folder for each "
                    "tokenization"
                )


def _listed_shards(folder: Path) -> dict[str, int] | None:
    """Return the tokens of each shard in ``corpus.json``; None without it, as from datatrove."""
    corpus_file = folder / CORPUS_FILE
    if not corpus_file.exists():
        return None
    try:
        corpus = json.loads(corpus_file.read_text())
        complete, listed = corpus["complete"], dict(corpus["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{corpus_file} is damaged: {error!r}; copy it again") from error
    if not complete:
        raise ShardError(
            f"{folder}: its tokenization was not finished; run the same `tst tokenize` command "
            "again to finish it"
        )
    return listed


def _check_shard(path: Path) -> Shard:
    """Return what the three files of a shard say, and check that they agree."""
    index, metadata = Path(f"{path}.index"), Path(f"{path}.metadata")
    try:
        end, text = _last_document_end(index), metadata.read_bytes()
    except FileNotFoundError as error:
        raise ShardError(
            f"{error.filename} is missing; {path.name} cannot be used without it, so copy it again"
        ) from error
    try:
        label, count = text.decode().splitlines()[:2]
        tokenizer, _, token_bytes = label.rpartition("|")
        width, tokens = int(token_bytes), int(count)
    except ValueError as error:
        raise ShardError(
            f"{metadata} is not datatrove's: its lines must be TOKENIZER|BYTES and the number of "
            "tokens"
        ) from error
    if width not in _DTYPES:
        raise ShardError(f"{metadata} says {width} bytes a token; it must be 2 or 4")
    size = path.stat().st_size
    if size % width:
        raise ShardError(
            f"{path} has {size:,} bytes, not a multiple of the {width} of a token; copy it again"
        )
    if size != tokens * width:
        what = "is truncated" if size < tokens * width else "is too long"
        raise ShardError(
            f"{path} {what}: it has {size // width:,} tokens, but its metadata says {tokens:,}; "
            "copy it again"
        )
    if end != tokens:
        raise ShardError(
            f"{index} ends its last document at token {end:,}, but {path.name} has {tokens:,}; "
            "copy both again"
        )
    return Shard(path, tokens, width, tokenizer)


def _last_document_end(index: Path) -> int:
    """Return the end of the last document in an index, in tokens; 0 for an empty index."""
    with index.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size % 8:
            raise ShardError(
                f"{index} has {size:,} bytes, not a multiple of the 8 of an entry; copy it again"
            )
        return int.from_bytes(os.pread(file.fileno(), 8, size - 8), "little") if size else 0
