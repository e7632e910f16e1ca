"""Dry runs of many jobs: each in a process of its own, with what came of it in a line."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ..config.manager import SuperpositionConfigManager
from ..errors import in_one_line
from .dry_run import dry_run
from .plan import Gpu, default_ranks, make_plan

RESERVE = 0.1  # of the memory: for the CUDA context, NCCL's buffers and fragmentation


def try_job(arguments: list[str], ranks: int | None, gpu: Gpu, play: bool) -> tuple[str, bool]:
    """Return what came of a job's dry run, in a line, and whether it fits.

    It runs in a process of its own: torch keeps meshes and rules of each job.

    Args:
        arguments: of the job, as on the command line.
        ranks: GPUs; None for those of its layout.
        gpu: their kind.
        play: whether to play steps and estimate memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(_attempt, arguments, ranks, gpu, play).result()
        except BrokenProcessPool:
            return "COULD NOT BE TRIED: its process was killed; is there enough memory?", False


def _attempt(*job: Any) -> tuple[str, bool]:
    """As :func:`_describe`, and what keeps the job from being tried."""
    try:
        return _describe(*job)
    except (ValueError, OSError) as error:
        return f"CANNOT RUN: {error}", False
    except (Exception, SystemExit) as error:  # a fault, and not one of the next job
        return f"COULD NOT BE TRIED: {in_one_line(error)}", False


def _describe(arguments: list[str], ranks: int | None, gpu: Gpu, play: bool) -> tuple[str, bool]:
    """What came of a job, and whether it fits.

    Raises:
        ValueError: if it cannot run.
    """
    config = SuperpositionConfigManager().parse_args(arguments)
    ranks = ranks or default_ranks(config)
    run = dry_run(config, ranks, play)
    plan = make_plan(config, ranks)
    mesh = ", ".join(f"{name} {size}" for name, size in run.mesh.items()) or "no parallelism"
    text = (
        f"{ranks} {gpu.name} ({mesh}), {plan.sequences:,} sequences = {plan.data_parallel_ranks} x "
        f"{plan.local_batch_size} x {run.accumulation}"
    )
    if run.untraced and play:
        return f"{text}; {run.untraced}", True
    if run.left_out and play:
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
