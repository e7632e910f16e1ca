"""Folders of token shards as large as wanted, which take hardly any room on the disk."""

import json
from pathlib import Path

TOKEN_BYTES = 4


def write_sparse_shards(
    folder: Path, shards: int, tokens: int, tokenizer: str = "unknown", corpus_file: bool = False
) -> Path:
    """Write shards of zeros with their true sizes, indexes and metadata.

    Args:
        folder: for them.
        shards: how many.
        tokens: of each, 4 bytes each.
        tokenizer: that the metadata name.
        corpus_file: whether to write ``corpus.json`` too, as ``tst tokenize`` does.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}_merged.ds" for number in range(shards)]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(TOKEN_BYTES * tokens)
        Path(f"{path}.index").write_bytes(tokens.to_bytes(8, "little"))
        metadata = f"{tokenizer}|{TOKEN_BYTES}\n{tokens}\n{tokens // 10**6} MT"
        Path(f"{path}.metadata").write_text(metadata)
    if corpus_file:
        content = {"complete": True, "shards": {path.name: tokens for path in paths}}
        (folder / "corpus.json").write_text(json.dumps(content))
    return folder
