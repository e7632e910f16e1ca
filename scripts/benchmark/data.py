"""Measure how many data tokens per second one core can feed to training.

It compares on-the-fly tokenization, the token-shard loader alone, and the loader in the whole
training iterator (batches, folding, transfer to the device), in turn in one process on one core.
The text is the demo's corpus, which is made if it is missing. The shards repeat its tokens, with 4
bytes each as for a vocabulary of 128,256, in a temporary folder. The results are medians of
interleaved rounds.

    python scripts/benchmark/data.py
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import measuring
import numpy as np
import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.tools.utils import device_module

from torchtitan.experiments.tst.config.job_config import JobConfig
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.core import Phase
from torchtitan.experiments.tst.data import tokenizer_identity
from torchtitan.experiments.tst.data.build import build_dataloader
from torchtitan.experiments.tst.data.demo_corpus import make_corpus, read_sources
from torchtitan.experiments.tst.data.tokenizer import open_tokenizer
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

SEQ_LEN, BATCH = 2048, 8
TARGET = 20e6  # tokens per second and process: ten times the highest rate in the paper's Table 1


def config(corpus: Path, bag_size: int, *args: str) -> JobConfig:
    """Return a job that is in superposition in all steps, or in recovery for bag size 1."""
    return SuperpositionConfigManager().parse_args(
        [
            "--model.flavor=demo",
            f"--model.hf_assets_path={corpus / 'tokenizer'}",
            f"--training.seq_len={SEQ_LEN}",
            f"--training.local_batch_size={BATCH}",
            "--training.steps=1000000",
            f"--superposition.bag_size={bag_size}",
            f"--superposition.steps={0 if bag_size == 1 else 999_999}",
            f"--job.dump_folder={corpus.parent / 'run'}",
            *args,
        ]
    )


def loader_batches(job_config: JobConfig, tokenizer: HuggingFaceTokenizer) -> Iterator[int]:
    """Yield the number of data tokens of each batch of the loader."""
    loader = build_dataloader(1, 0, tokenizer, job_config)
    for _, labels in loader:
        yield labels.numel()


def trainer_batches(job_config: JobConfig) -> Iterator[int]:
    """Yield the number of data tokens of each step's batch, folded and on the device."""
    trainer = SuperpositionTrainer(job_config)
    batches = trainer.batch_generator(trainer.dataloader)
    trainer.step = 1
    while True:
        if trainer.schedule.phase(trainer.step) is Phase.SUPERPOSITION:
            ((inputs, labels),) = trainer.fold_step(batches)
        else:
            inputs, labels = next(batches)
        inputs["input"].to(trainer.device)
        labels.to(trainer.device)
        device_module.synchronize()
        yield inputs["input"].numel()


def rate(batches: Iterator[int], seconds: float) -> float:
    """Return the data tokens per second."""
    begin, tokens = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        tokens += next(batches)
    return tokens / elapsed


def compare(
    bag_size: int, corpus: Path, shards: Path, rounds: int, seconds: float
) -> dict[str, float]:
    """Return the median rate of each way for one bag size."""
    tokenizer = open_tokenizer(corpus / "tokenizer")
    text = ("--training.dataset=jsonl", f"--training.dataset_path={corpus / 'train.jsonl'}")
    tokens = ("--training.dataset=token_shards", f"--training.dataset_path={shards}")
    ways = {
        "tokenizing on the fly": loader_batches(config(corpus, bag_size, *text), tokenizer),
        "shard loader": loader_batches(config(corpus, bag_size, *tokens), tokenizer),
        "training iterator": trainer_batches(config(corpus, bag_size, *tokens)),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for batches in ways.values():
        rate(batches, seconds / 2)  # warm-up
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):  # in a new order each round
            rates[name].append(rate(ways[name], seconds))
    torch.distributed.destroy_process_group()
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2, help="seconds of each way in a round (default: 2)"
    )
    parser.add_argument(
        "--tokens", type=int, default=500_000_000, help="tokens in the shards (default: 500M)"
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        help="folder with train.jsonl and tokenizer (default: the demo's corpus is made)",
    )
    args = parser.parse_args()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    torch.set_num_threads(1)
    measuring.be_the_only_process()
    with tempfile.TemporaryDirectory() as folder:
        corpus, shards = args.corpus or Path(folder, "corpus"), Path(folder, "shards")
        if not args.corpus:
            make_corpus(corpus, list(read_sources()))
        tokenizer = open_tokenizer(corpus / "tokenizer")
        text = (corpus / "train.jsonl").read_text()[:4_000_000]
        document = np.array(tokenizer.encode(text))
        documents = [document[: args.tokens]] * max(1, args.tokens // len(document))
        measuring.write_shard(shards, documents, tokenizer_identity.label("demo", tokenizer))
        print(f"{'':24}" + "".join(f"{'s = ' + str(s):>12}" for s in (1, 6, 16)))
        results = [compare(s, corpus, shards, args.rounds, args.seconds) for s in (1, 6, 16)]
    for way in results[0]:
        cells = "".join(f"{result[way] / 1e6:11.2f}M" for result in results)
        print(f"{way:24}{cells}  tokens/s (median of {args.rounds})")
    slowest = min(result["training iterator"] for result in results)
    print(f"slowest training iterator: {slowest / TARGET:.1f} times the target of 20M tokens/s")


if __name__ == "__main__":
    main()
