"""Measure the cost of a checkpoint's checksums on a disk.

It saves and loads the same tensors with DCP's own writer and reader and with ours, in turn, in one
process, and prints medians of the rounds. "checking" is the check of a resume before it loads.

    python scripts/benchmark/checkpoint.py --gigabytes 2 --folder /scratch
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from torchtitan.experiments.tst.resilience.checkpoint import inventory, manifests
from torchtitan.experiments.tst.resilience.checkpoint.reader import SafeLoadPlanner, SafeReader
from torchtitan.experiments.tst.resilience.checkpoint.writer import CheckpointWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of a checkpoint")
    parser.add_argument("--rounds", type=int, default=6, help="number of rounds")
    parser.add_argument(
        "--folder", type=Path, help="folder on the disk to measure (default: a temporary folder)"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-checkpoint-", dir=options.folder))
    tensors = 64
    numbers = int(options.gigabytes * 1e9 / 4 / tensors)
    state = {f"layer.{i}": torch.randn(numbers) for i in range(tensors)}
    loaded = {name: torch.empty_like(value) for name, value in state.items()}
    manifest = {"step": 1, "boundary": False}
    ours, theirs = inventory.step_folder(folder, 1), folder / "dcp"

    def check() -> None:
        assert not manifests.damages(ours, manifests.read_manifest(ours)["files"])

    actions = {
        "saving, DCP alone": lambda: dcp.save(state, storage_writer=dcp.FileSystemWriter(theirs)),
        "saving with checksums": lambda: dcp.save(
            state, storage_writer=CheckpointWriter(folder, 1, manifest)
        ),
        "checking": check,
        "loading, DCP alone": lambda: dcp.load(loaded, checkpoint_id=theirs),
        "loading, ours": lambda: dcp.load(
            loaded, storage_reader=SafeReader(ours), planner=SafeLoadPlanner()
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    try:
        for i in range(options.rounds + 1):
            order = list(actions)
            if i % 2:  # take turns, because the first one finds another state of the disk's cache
                order[:2] = reversed(order[:2])
            for name in order:
                action = actions[name]
                if name.startswith("saving"):  # to a new folder, because overwriting is faster
                    shutil.rmtree(theirs if "alone" in name else ours, ignore_errors=True)
                begin = time.perf_counter()
                action()
                seconds[name].append(time.perf_counter() - begin)
    finally:
        shutil.rmtree(folder)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, time_taken in median.items():
        print(f"{name:22} {time_taken:8.2f} s {options.gigabytes / time_taken:8.2f} GB/s")
    ratio = median["saving with checksums"] / median["saving, DCP alone"]
    print(json.dumps({"gigabytes": options.gigabytes, "saving ratio": ratio, "seconds": median}))


if __name__ == "__main__":
    main()
