"""Measure what a run on trillions of tokens needs at its start, and how fast it then reads.

The token shards have true sizes, indexes and metadata, but their tokens are holes in sparse files:
100,000 shards of 20M tokens are 8 TB, and need 0.8 GB of the disk. It measures the start on several
ranks of this machine. Then it measures the loader of one of 64 ranks on one core, on these shards
and on one shard per source with as many tokens, in interleaved rounds. The job is
train_configs/paper/10B-A1B-50k-tst.toml.

    python scripts/benchmark/many_shards.py
"""

import argparse
import json
import os
import pickle
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from torchtitan.experiments.tst.config.job_config import JobConfig
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.data.shards.loader import ShardsDataloader, open_mixture

CONFIG = Path(__file__).parents[2] / "train_configs/paper/10B-A1B-50k-tst.toml"
TOKEN_BYTES = 4
RANKS, NODE = 64, 8  # ranks of the job, and ranks on one of its machines
NEEDED = 379_000  # data tokens per second that a GPU needs in superposition


def write_sparse_shards(
    folder: Path, shards: int, tokens: int, tokenizer: str = "unknown", corpus_file: bool = False
) -> Path:
    """Write shards of zeros with their true sizes, indexes and metadata.

    Args:
        folder: folder of the shards.
        shards: number of shards.
        tokens: tokens of each shard, 4 bytes each.
        tokenizer: name of the tokenizer in the metadata.
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


def config(folders: list[Path]) -> JobConfig:
    """Return the paper's job on these folders."""
    paths = ",".join(map(str, folders))
    arguments = [f"--job.config_file={CONFIG}", f"--token_shards.paths={paths}"]
    return SuperpositionConfigManager().parse_args(arguments)


def start(folders: list[Path], results: Path) -> None:
    """Open the sources on this rank, and write a JSON file with what that took."""
    opened = []

    def count(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).startswith(f"{results}/"):
            opened.append(arguments[0])

    job_config = config(folders)
    sys.addaudithook(count)
    before, began = _peak(), time.perf_counter()
    mixture = open_mixture(job_config, None)
    result = {
        "opened": len(opened),
        "seconds": time.perf_counter() - began,
        "megabytes": _peak() - before,
        "kept": len(pickle.dumps(mixture)),
    }
    (results / f"{os.environ['RANK']}.json").write_text(json.dumps(result))


def _peak() -> float:
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def batches(job_config: JobConfig, rank: int) -> Iterator[int]:
    """Yield the number of data tokens of each batch of one of the job's ranks."""
    for _, labels in ShardsDataloader(RANKS, rank, None, job_config):
        yield labels.numel()


def rate(tokens: Iterator[int], seconds: float) -> float:
    """Return the data tokens per second of CPU time; nothing waits for a disk."""
    begin, read = time.process_time(), 0
    while (elapsed := time.process_time() - begin) < seconds:
        read += next(tokens)
    return read / elapsed


def files_of_a_step(job_config: JobConfig, shard_tokens: int) -> tuple[float, int]:
    """Return the shards read in a superposition step: the job's mean, and a machine's maximum."""
    loader = ShardsDataloader(RANKS, 0, None, job_config)
    position, whole, most = loader.mixture.start(), [], 0
    shape = loader.reader.schedule.batch_shape(1, job_config.training.local_batch_size, 4096)
    length, count = shape.data_tokens + 1, shape.sequences * loader.reader.accumulation * RANKS
    for _ in range(20):
        windows, position = loader.mixture.take(position, count, length)
        files = [
            {(w.source, at // shard_tokens) for at in (w.position, w.position + length - 1)}
            for w in windows
        ]
        whole.append(len(set().union(*files)))
        part = count * NODE // RANKS
        nodes = (set().union(*files[at : at + part]) for at in range(0, count, part))
        most = max(most, *map(len, nodes))
    return statistics.mean(whole), most


def main() -> None:
    from torchtitan.experiments.tst.testing import ranks

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=100_000, help="shards of both sources")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens of a shard")
    parser.add_argument("--ranks", type=int, default=4, help="ranks that start here, at least 2")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds")
    parser.add_argument("--seconds", type=float, default=3, help="seconds of a round")
    args = parser.parse_args()
    each = args.shards // 2
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        many = [write_sparse_shards(root / name, each, args.tokens) for name in ("a", "b")]
        one = [write_sparse_shards(root / f"{name}1", 1, each * args.tokens) for name in ("a", "b")]
        if failure := ranks.run_ranks(start, args.ranks, root, many, root):
            sys.exit(failure)
        of_ranks = [json.loads((root / f"{r}.json").read_text()) for r in range(args.ranks)]
        for name, results in {"rank 0": of_ranks[:1], "the others": of_ranks[1:]}.items():
            most = {key: max(result[key] for result in results) for key in results[0]}
            print(
                f"{name}: {most['opened']:,} files opened, ready after {most['seconds']:.1f} s, "
                f"{most['megabytes']:.0f} MB more at the peak, {most['kept']:,} bytes kept"
            )
        jobs = {f"{each:,} shards a source": config(many), "1 shard a source": config(one)}
        files, of_machine = files_of_a_step(jobs[next(iter(jobs))], args.tokens)
        print(f"shards read in a step: {files:.1f} by the job, at most {of_machine} by a machine")
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # one core
        torch.set_num_threads(1)
        loaders = {name: batches(job_config, RANKS // 2) for name, job_config in jobs.items()}
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for loader in loaders.values():
            rate(loader, args.seconds / 2)  # warm-up
        for _ in range(args.rounds):
            for name in random.sample(list(loaders), len(loaders)):
                rates[name].append(rate(loaders[name], args.seconds))
        for name, values in rates.items():
            median = statistics.median(values)
            print(
                f"{name}: {median / 1e6:.0f}M data tokens/s (median of {args.rounds}), "
                f"{median / NEEDED:.0f} times the {NEEDED:,} that a GPU needs"
            )


if __name__ == "__main__":
    main()
