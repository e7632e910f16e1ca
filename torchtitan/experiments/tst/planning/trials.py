"""Dry runs of many jobs, each in its own process, each with its result in one line."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ..config.manager import SuperpositionConfigManager
from ..errors import in_one_line
from .dry_run import dry_run
from .plan import Gpu, default_ranks, make_plan

# share of the memory kept free for the CUDA context, NCCL's buffers and fragmentation
RESERVE = 0.1


def try_job(arguments: list[str], ranks: int | None, gpu: Gpu, simulate: bool) -> tuple[str, bool]:
    """Return the result of a job's dry run in one line, and whether the job fits.

    The dry run has its own process, because torch keeps meshes and sharding rules of each job.

    Args:
        arguments: arguments of the job, as on the command line.
        ranks: number of GPUs; None for that of the job's layout.
        gpu: kind of GPU.
        simulate: whether to simulate steps and estimate memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(_attempt, arguments, ranks, gpu, simulate).result()
        except BrokenProcessPool:
            return (
                "COULD NOT BE TRIED: its process was killed. This machine may lack memory",
                False,
            )


def _attempt(*job: Any) -> tuple[str, bool]:
    """Return what :func:`_describe` returns, or why the job cannot run or be tried."""
    try:
        return _describe(*job)
    except (ValueError, OSError) as error:
        return f"CANNOT RUN: {error}", False
    except (Exception, SystemExit) as error:  # a bug; the next jobs are still tried
        return f"COULD NOT BE TRIED: {in_one_line(error)}", False


def _describe(
    arguments: list[str], ranks: int | None, gpu: Gpu, simulate: bool
) -> tuple[str, bool]:
    """Return the result of a job's dry run in one line, and whether the job fits.

    Raises:
        ValueError: if the job cannot run.
    """
    config = SuperpositionConfigManager().parse_args(arguments)
    ranks = ranks or default_ranks(config)
    run = dry_run(config, ranks, simulate)
    plan = make_plan(config, ranks)
    mesh = ", ".join(f"{name} {size}" for name, size in run.mesh.items()) or "no parallelism"
    text = (
        f"{ranks} {gpu.name} ({mesh}), {plan.sequences:,} sequences = {plan.data_parallel_ranks} x "
        f"{plan.local_batch_size} x {run.accumulation}"
    )
    if run.untraced and simulate:
        return f"{text}; {run.untraced}", True
    if run.left_out and simulate:
        text += f" (without {', '.join(run.left_out)})"
    fits = all(memory.peak <= (1 - RESERVE) * gpu.memory for memory in run.memory.values())
    for stage, memory in run.memory.items():
        text += f"; {stage} {memory.peak / 1e9:.1f} GB"
        if "pp" in run.mesh:
            text += f" on pipeline rank {memory.pipeline_rank}"
        if stage in run.worst_case:
            text += f", at worst {run.worst_case[stage].peak / 1e9:.1f} GB"
    if not fits:
        text += f": TOO MUCH for {gpu.memory / 1e9:.0f} GB less {100 * RESERVE:.0f} %"
    return text, fits
