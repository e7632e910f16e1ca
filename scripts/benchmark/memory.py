"""Measure the peak memory of a step of each stage, and compare it with the dry run's estimate.

One process simulates rank 0 of the job's ranks with the fake backend: it holds that rank's
parameters, gradients, optimizer state and activations, and its collectives do not move data. The
dry run is that of `tst dry-run`, in another process. Both are eager. A step is one micro-batch of
training.local_batch_size on random tokens. Arguments that are not listed here are the job's. Writes
table and JSON.

    python scripts/benchmark/memory.py --job.config_file train_configs/paper/600M-20k-tst.toml
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import measuring
import step
import torch.distributed as dist
from torchtitan.tools.logging import logger

from command_line import documented_parser
from torchtitan.experiments.tst.checks.model import model_args_of
from torchtitan.experiments.tst.config.job_config import JobConfig
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.planning.dry_run import dry_run

STEPS = 3  # steps of each stage; from the second one on, the optimizer's states exist


def job(arguments: list[str], folder: Path) -> JobConfig:
    """Return the job for the dry run and for this machine, with superposition in half its steps."""
    config = step.job(arguments, folder)
    config.compile.enable = False
    config.comm.mode = "fake_backend"
    config.superposition.steps = config.training.steps // 2
    return config


def estimated(arguments: list[str], ranks: int) -> dict[str, int]:
    """Return the peaks of the dry run in bytes; it runs in a process without GPUs."""
    command = [sys.executable, __file__, "--dry-run", "--ranks", str(ranks), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"The dry run failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def measured(arguments: list[str], ranks: int, folder: Path) -> dict[str, int]:
    """Return the measured peaks in bytes, each of a trainer that begins in that stage."""
    os.environ |= {"NGPU": str(ranks), "WORLD_SIZE": str(ranks), "RANK": "0", "LOCAL_RANK": "0"}
    peaks = {}
    config = job(arguments, folder)
    step.random_tokens(folder / "tokens", model_args_of(config).vocab_size)
    stages = build_schedule(config).until(config.training.steps)
    for stage in {stage.bag_size: stage for stage in stages}.values():

        def run(first: int = stage.first) -> None:
            with step.no_tokenizer(config.model.name):
                trainer = step.BenchmarkTrainer(config)
            take_step = step.steps_of(trainer, first + 1)
            for _ in range(STEPS):
                take_step()
            trainer.close()

        peaks[str(stage)] = measuring.peak_bytes(run)
        step.free_memory()
    dist.destroy_process_group()
    return peaks


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "--ranks", type=int, default=8, help="ranks of the job (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/benchmark"),
        help="folder of the results (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the dry run's peaks")
    args, arguments = parser.parse_known_args()
    logger.setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.dry_run:
            memory = dry_run(job(arguments, folder), args.ranks).memory
            print(json.dumps({str(stage): peaks.peak for stage, peaks in memory.items()}))
            return
        expected = estimated(arguments, args.ranks)
        peaks = measured(arguments, args.ranks, folder)
    header = [f"rank 0 of {args.ranks}", "measured MiB", "dry run MiB", "measured / dry run"]
    rows = [
        [
            stage,
            f"{peak / 2**20:,.0f}",
            f"{expected[stage] / 2**20:,.0f}",
            f"{peak / expected[stage]:.3f}",
        ]
        for stage, peak in peaks.items()
    ]
    numbers = {stage: {"measured": peaks[stage], "dry_run": expected[stage]} for stage in peaks}
    text = measuring.table(header, rows)
    measuring.write_results(args.output, "memory", text, {"peak_bytes": numbers})


if __name__ == "__main__":
    main()
