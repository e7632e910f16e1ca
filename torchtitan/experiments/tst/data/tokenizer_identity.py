"""Identify a tokenizer by its content, not by the name of its folder."""

import json
import re

import xxhash
from torchtitan.components.tokenizer import BaseTokenizer

# A text that different rules split into different tokens.
_PROBE = "The  year 2026's\n\tnaïve café, 你好! <|x|> for i in range(10): x += 1.5e-3 # Ünïcödé 🙂"


_LABEL = re.compile(r".* \(xxh3 ([0-9a-f]{16})\)")


def entries(tokenizer: BaseTokenizer) -> int:
    """Return one more than the highest token id: ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def checksum(tokenizer: BaseTokenizer) -> str:
    """Return an XXH3-64 checksum of vocabulary, merges and special tokens, hexadecimal."""
    merges = []
    if rules := getattr(tokenizer, "tokenizer", None):  # an object of the tokenizers library
        merges = json.loads(rules.to_str())["model"].get("merges", [])
    content = [
        sorted(tokenizer.get_vocab().items()),
        [merge.split(" ") if isinstance(merge, str) else merge for merge in merges],
        tokenizer.encode(_PROBE, add_bos=True, add_eos=True),
    ]
    return xxhash.xxh3_64_hexdigest(json.dumps(content).encode())


def label(name: str, tokenizer: BaseTokenizer) -> str:
    """Return the name of a tokenizer in the metadata of our shards: its name and checksum."""
    return f"{name} (xxh3 {checksum(tokenizer)})"


def checksum_in(label: str) -> str | None:
    """Return the checksum in a label; None if the label is only a name, such as datatrove's."""
    match = _LABEL.fullmatch(label)
    return match and match[1]
