"""Documents as corpora have them, and token shards made of them in this process."""

import json
from pathlib import Path

import numpy as np
from datasets import IterableDataset, load_dataset
from datatrove.pipeline.tokens.tokenizer import TokenizedFile

from torchtitan.experiments.tst.data.shards.executors import LocalExecutor
from torchtitan.experiments.tst.data.shards.tokenization import Options, prepare

# Records of public corpora without their text, with the fields of the dataset cards
DCLM = {
    "bff_contained_ngram_count_before_dedupe": 0,
    "language_id_whole_page_fasttext": {"en": 0.9},
    "metadata": {"Content-Type": "application/http", "WARC-Date": "2017-01-01T00:00:00Z"},
    "previous_word_count": 5,
    "url": "http://example.com",
    "warcinfo": "robots: classic",
    "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.1,
}
FINEWEB_EDU = {
    "id": "<urn:uuid:0>",
    "dump": "CC-MAIN-2013-20",
    "url": "http://example.com",
    "file_path": "s3://...",
    "language": "en",
    "language_score": 0.9,
    "token_count": 5,
    "score": 3.5,
    "int_score": 4,
}


def prepare_here(source: Path | str, folder: Path, options: Options) -> list:
    """What is left to do of a tokenization, in this process."""

    def executor(pipeline, name, tasks, logs):
        return LocalExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(logs))

    return prepare(str(source), folder, options, executor)


def tokenize(source: Path | str, folder: Path, options: Options) -> None:
    """In this process, what is left to do."""
    for work in prepare_here(source, folder, options):
        work.run()


def write_shards(
    folder: Path, shards: list[list[list[int]]], token_bytes: int = 2, tokenizer: str = "unknown"
) -> Path:
    """Shards of documents of token ids, written by datatrove."""
    for number, documents in enumerate(shards):
        file = TokenizedFile(
            str(folder),
            f"{number:05d}.ds",
            tokenizer_name_or_path=tokenizer,
            save_final_metadata=True,
            token_size=token_bytes,
        )
        for document in documents:
            file.write(document, None)
        file.close()
    return folder


def load_jsonl(corpus: Path) -> IterableDataset:
    """Both files of the small corpus, as a dataset on the hub would be loaded."""
    paths = [str(corpus / f"{name}.jsonl") for name in ("train", "validation")]
    return load_dataset("json", data_files=paths, split="train", streaming=True)


def documents(folder):
    """Token ids of each document of a folder."""
    found = []
    for path in sorted(folder.glob("*.ds")):
        width = int((folder / f"{path.name}.metadata").read_text().splitlines()[0][-1])
        tokens = np.fromfile(path, f"<u{width}").tolist()
        ends = np.fromfile(f"{path}.index", "<u8").tolist()
        found += [tokens[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return found


def write_jsonl(path, texts, opener=open):
    with opener(path, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path
