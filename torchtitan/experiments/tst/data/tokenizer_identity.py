"""Which tokenizer it is, told from its content and not from the name of its folder."""

import json
import re

import xxhash
from torchtitan.components.tokenizer import BaseTokenizer

# of which different rules make different tokens
_PROBE = "The  year 2026's\n\tnaïve café, 你好! <|x|> for i in range(10): x += 1.5e-3 # Ünïcödé 🙂"


_LABEL = re.compile(r".* \(xxh3 ([0-9a-f]{16})\)")


def entries(tokenizer: BaseTokenizer) -> int:
    """One more than the highest token id: ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def checksum(tokenizer: BaseTokenizer) -> str:
    """XXH3-64 of vocabulary, merges and how a document begins and ends, hexadecimal."""
    merges = []
    if rules := getattr(tokenizer, "tokenizer", None):  # of the tokenizers library
        merges = json.loads(rules.to_str())["model"].get("merges", [])
    content = [
        sorted(tokenizer.get_vocab().items()),
        [merge.split(" ") if isinstance(merge, str) else merge for merge in merges],
        tokenizer.encode(_PROBE, add_bos=True, add_eos=True),
    ]
    return xxhash.xxh3_64_hexdigest(json.dumps(content).encode())


def label(name: str, tokenizer: BaseTokenizer) -> str:
    """How the metadata of our own shards name their tokenizer."""
    return f"{name} (xxh3 {checksum(tokenizer)})"


def checksum_in(label: str) -> str | None:
    """The checksum that a label gives; None if it is only a name, as datatrove's are."""
    match = _LABEL.fullmatch(label)
    return match and match[1]
