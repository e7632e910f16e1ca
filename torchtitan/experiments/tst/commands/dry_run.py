"""Try jobs without their GPUs: layout, batch and memory, a line for each.

    tst dry-run train_configs/paper/*.toml
    tst dry-run JOB.toml --ranks 16 --parallelism.data_parallel_shard_degree=16

The real trainer is built as rank 0 of all ranks and plays a step of each stage and of recovery on
tensors without content. With pipeline parallelism, it is each rank of the pipeline in turn, and the
line names the one that needs the most memory. With expert parallelism, memory is estimated for
routers that give all experts the same number of tokens, and "at worst" for routers that send as
many as they can to one GPU's experts. Whether a job fits does not depend on the latter.

Exits with 1 if a job cannot run, does not fit or could not be tried. For one job's tokens and
hours: tst plan. Further arguments are the jobs', over their TOMLs.
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
        overrides: the jobs' arguments.
        jobs: their TOMLs.
        ranks: GPUs.
        gpu: Their kind.
        memory: Play steps and estimate the memory. Without, jobs are built only, which is faster.
    """
    check_positive(ranks=ranks)
    if not jobs:
        raise ArgumentError("give a JOB.toml")
    failed = 0
    for number, job in enumerate(jobs, 1):
        begin = time.perf_counter()
        text, fits = try_job(job_arguments(job, overrides), ranks, GPUS[gpu], memory)
        failed += not fits
        seconds = time.perf_counter() - begin
        print(f"[{number}/{len(jobs)}] {job}: {text} ({seconds:.0f} s)", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(jobs)} jobs cannot run, do not fit or were not tried")
