"""Try jobs without their GPUs: print layout, batch and memory, one line each.

    tst dry-run train_configs/paper/*.toml
    tst dry-run JOB.toml --ranks 16 --parallelism.data_parallel_shard_degree=16

Builds the real trainer as rank 0 of all ranks. Simulates a step of each stage and of recovery on
fake tensors. With pipeline parallelism, each rank of the pipeline is simulated, and the line names
the rank that needs the most memory. With expert parallelism, the memory is for routers that send
the same number of tokens to all experts. The memory "at worst" is for routers that send as many
tokens as possible to the experts of one GPU. It does not decide whether a job fits.

The exit code is 1 if a job cannot run, does not fit or could not be tried. For the tokens and GPU
hours of a job, use tst plan. Further arguments override the TOML of each job.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..errors import ArgumentError
from ..planning.plan import GPUS
from ..planning.trials import try_job
from .arguments import GpuKind, Ranks, check_positive, job_arguments


def main(
    overrides: list[str],
    jobs: Annotated[Positional[tuple[Path, ...]], arg(metavar="JOB.toml", help="The jobs.")],
    /,
    ranks: Ranks = None,
    gpu: GpuKind = "B200",
    memory: bool = True,
) -> None:
    """Try jobs.

    Args:
        overrides: Arguments of the jobs.
        jobs: TOML files of the jobs.
        ranks: Number of GPUs.
        gpu: Kind of GPU.
        memory: Simulate steps and estimate the memory.
            Without it, jobs are only built, which is faster.
    """
    check_positive(ranks=ranks)
    if not jobs:
        raise ArgumentError("give at least one JOB.toml")
    failed = 0
    for number, job in enumerate(jobs, 1):
        begin = time.perf_counter()
        text, fits = try_job(job_arguments(job, overrides), ranks, GPUS[gpu], memory)
        failed += not fits
        seconds = time.perf_counter() - begin
        print(f"[{number}/{len(jobs)}] {job}: {text} ({seconds:.0f} s)", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(jobs)} jobs cannot run, do not fit or were not tried")
