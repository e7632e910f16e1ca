"""A folder of token shards as one sequence of token ids.

The format is datatrove's: ``NAME.ds`` holds token ids of 2 or 4 bytes (little endian),
``NAME.ds.index`` the end of each document in tokens (8 bytes each), ``NAME.ds.metadata`` the name
of the tokenizer, the bytes of a token and the number of tokens. Folders written by
``tst tokenize`` also have ``corpus.json``, which says that they are complete.
"""

import functools
import json
import os
from bisect import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from torchtitan.components.tokenizer import BaseTokenizer

from ...errors import UserError
from ..tokenizer_identity import checksum, checksum_in, entries

CORPUS_FILE = "corpus.json"
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class ShardError(UserError, ValueError):
    """Token shards that cannot be trained on; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    path: Path
    start: int  # of its tokens in the sequence
    tokens: int
    token_bytes: int
    tokenizer: str  # as its metadata names it

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` of its tokens, in their own type, mapped into memory."""
        try:
            return np.memmap(
                _open(self.path), _DTYPES[self.token_bytes], "r", start * self.token_bytes, (count,)
            )
        except (OSError, ValueError) as error:  # gone, or shorter than the mapping
            raise ShardError(f"{self.path} cannot be read any more: {error}") from error


@functools.lru_cache(maxsize=16)
def _open(path: Path) -> BinaryIO:
    return path.open("rb")


class TokenShards:
    """An endless sequence: the shards in the order of their names, and again from the first.

    Args:
        folder: with the shards.
        tokenizer: of the run, which the shards are held to; None for no check.

    Attributes:
        name: of the folder.
        tokens: in all shards.
        vocabulary: one more than the highest id that is allowed.
        same_tokenizer: whether the shards are known to be of the run's tokenizer.

    Raises:
        ShardError: if a shard is damaged, incomplete or of another tokenizer.
    """

    def __init__(self, folder: str | Path, tokenizer: BaseTokenizer | None = None):
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        listed = _listed_shards(self.folder)
        self._shards = read_shards(self.folder)
        if listed is not None:
            self._check_listed(listed)
        self.tokens = sum(shard.tokens for shard in self._shards)
        self._check_alike()
        self.vocabulary, self.same_tokenizer = 2**32, False
        if tokenizer:
            self._check_tokenizer(tokenizer)
        self._starts = [shard.start for shard in self._shards]

    def read(self, position: int, count: int) -> np.ndarray:
        """Tokens ``position`` to ``position + count`` of the endless sequence, int64.

        Raises:
            ShardError: if a shard cannot be read, or has an id that the tokenizer does not.
        """
        tokens, filled = np.empty(count, np.int64), 0
        while filled < count:
            at = (position + filled) % self.tokens
            shard = self._shards[bisect(self._starts, at) - 1]
            part = shard.read(
                at - shard.start, min(count - filled, shard.start + shard.tokens - at)
            )
            self._check_ids(shard, at - shard.start, part)
            tokens[filled : filled + len(part)] = part
            filled += len(part)
        return tokens

    def checksum(self) -> str:
        """XXH3-64 of the shards' names and sizes and how first and last begin, hexadecimal."""
        content = xxhash.xxh3_64()
        for shard in self._shards:
            content.update(f"{shard.path.name} {shard.tokens} {shard.token_bytes}\n".encode())
        for shard in (self._shards[0], self._shards[-1]):
            content.update(shard.read(0, min(shard.tokens, 2**16)).tobytes())
        return content.hexdigest()

    def _check_listed(self, listed: dict[str, int]) -> None:
        found = {shard.path.name: shard.tokens for shard in self._shards}
        for name in sorted({*listed, *found}):
            if listed.get(name) != found.get(name):
                raise ShardError(
                    f"{self.folder / name} has {found.get(name)} tokens, and {CORPUS_FILE} beside "
                    f"it says {listed.get(name)}: missing, too many, or of another corpus"
                )

    def _check_alike(self) -> None:
        first = self._shards[0]
        for shard in self._shards[1:]:
            for what in ("token_bytes", "tokenizer"):
                if getattr(shard, what) != getattr(first, what):
                    raise ShardError(
                        f"{shard.path} has {what} = {getattr(shard, what)!r} in its metadata, "
                        f"{first.path.name} beside it {getattr(first, what)!r}"
                    )

    def _check_tokenizer(self, tokenizer: BaseTokenizer) -> None:
        first, self.vocabulary = self._shards[0], entries(tokenizer)
        if theirs := checksum_in(first.tokenizer):
            if theirs != (ours := checksum(tokenizer)):
                raise ShardError(
                    f"{first.path} was made with another tokenizer than the run's: "
                    f"{first.tokenizer}, and the run's has checksum {ours} (model.hf_assets_path)"
                )
            self.same_tokenizer = True
        elif first.token_bytes == 2 and self.vocabulary > 2**16:
            raise ShardError(
                f"{first.path} has 2 bytes a token, too few for the {self.vocabulary:,} entries of "
                f"the run's tokenizer (model.hf_assets_path): it was made with another, "
                f"{first.tokenizer}"
            )
        else:
            for shard in self._shards:
                self._check_ids(shard, 0, shard.read(0, min(shard.tokens, 2**16)))

    def _check_ids(self, shard: Shard, start: int, tokens: np.ndarray) -> None:
        if (highest := tokens.max()) >= self.vocabulary:
            where = start + int(tokens.argmax())
            raise ShardError(
                f"{shard.path} has token id {highest} at token {where}, and the run's tokenizer "
                f"(model.hf_assets_path) {self.vocabulary:,} entries: it was made with another, "
                f"{shard.tokenizer}"
            )


def read_shards(folder: Path) -> list[Shard]:
    """The shards of a folder, in the order of their names.

    Raises:
        ShardError: if there are none, or one is damaged.
    """
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder (of token shards, *.ds)")
    shards: list[Shard] = []
    for path in sorted(folder.glob("*.ds")):
        shard = _check_shard(path, shards[-1].start + shards[-1].tokens if shards else 0)
        if shard.tokens:  # datatrove leaves an empty one where a task had no documents
            shards.append(shard)
    if not shards:
        raise ShardError(f"{folder} has no token shards (*.ds), or only empty ones")
    return shards


def _listed_shards(folder: Path) -> dict[str, int] | None:
    """The tokens of each shard after ``corpus.json``; None for a folder without, as datatrove's."""
    corpus_file = folder / CORPUS_FILE
    if not corpus_file.exists():
        return None
    try:
        corpus = json.loads(corpus_file.read_text())
        complete, listed = corpus["complete"], dict(corpus["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{corpus_file} is damaged: {error!r}") from error
    if not complete:
        raise ShardError(
            f"{folder}: its tokenization was not finished; run `tst tokenize` as "
            "before to finish it"
        )
    return listed


def _check_shard(path: Path, start: int) -> Shard:
    """What its three files say, which must agree."""
    index, metadata = Path(f"{path}.index"), Path(f"{path}.metadata")
    for file in (index, metadata):
        if not file.exists():
            raise ShardError(f"{file} is missing; {path.name} cannot be trusted without it")
    try:
        label, count = metadata.read_text().splitlines()[:2]
        tokenizer, _, token_bytes = label.rpartition("|")
        width, tokens = int(token_bytes), int(count)
    except ValueError as error:
        raise ShardError(
            f"{metadata} is not datatrove's: a line TOKENIZER|BYTES and one with the number of "
            "tokens are expected"
        ) from error
    if width not in _DTYPES:
        raise ShardError(f"{metadata} says {width} bytes a token; there are shards of 2 and of 4")
    size = path.stat().st_size
    if size % width:
        raise ShardError(f"{path} has {size:,} bytes, not a multiple of the {width} of a token")
    if size != tokens * width:
        what = "is truncated" if size < tokens * width else "is too long"
        raise ShardError(
            f"{path} {what}: it has {size // width:,} tokens, and its metadata says {tokens:,}"
        )
    if (end := _last_document_end(index)) != tokens:
        raise ShardError(
            f"{index} ends its last document at token {end:,}, and {path.name} has {tokens:,}"
        )
    return Shard(path, start, tokens, width, tokenizer)


def _last_document_end(index: Path) -> int:
    size = index.stat().st_size
    if size % 8:
        raise ShardError(f"{index} has {size:,} bytes, not a multiple of the 8 of an entry")
    if not size:
        return 0
    with index.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        return int.from_bytes(file.read(), "little")
