"""Tokenize a corpus once, into token shards for training.

    tst tokenize "corpus/*.jsonl.zst" tokens --tokenizer assets/hf/Llama-3.1-8B
    tst tokenize hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT tokens --tokenizer TOKENIZER

A document has the same tokens as if it was tokenized while training. If the command was killed, run
it again with the same arguments to resume. It runs datatrove. FOLDER/logs has the logs and the
state of each task.
"""

import time
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..data.shards.tokenization_options import Machine, Options
from .arguments import check_positive


def main(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")],
    /,
    options: Options,
    machine: Machine,
) -> None:
    """Tokenize a corpus.

    Args:
        source: JSON lines (also .gz and .zst) or Parquet:
            a file, a folder, a pattern in quotes, or a URL such as
            hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT.
            Or the name of a dataset on the Hugging Face hub,
            such as allenai/c4.
        folder: Folder for the shards. Set training.dataset_path to it.
        options: How to tokenize.
        machine: Where to tokenize.
    """
    check_positive(workers=machine.workers, tasks=options.tasks)
    from ..data.shards.executors import tokenize
    from ..data.shards.tokenization import read_corpus_file

    folder, begin = folder.absolute(), time.perf_counter()
    worked = tokenize(source, folder, options, machine)
    content = read_corpus_file(folder)
    if not content["complete"]:
        print(f"Submitted. {folder} is complete when its corpus.json has complete = true")
        return
    print(
        f"{folder} is complete: {content['documents']:,} documents, {content['tokens']:,} tokens "
        f"in {len(content['shards'])} shards; {content['dropped_tokens']:,} tokens dropped"
    )
    if worked:
        seconds = time.perf_counter() - begin
        print(f"{seconds:.0f} s, {content['tokens'] / seconds / 1e6:.2f}M tokens/s")
