"""Where a tokenization runs: this machine, Slurm or Ray, by datatrove's executors."""

import contextlib
import fcntl
import functools
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("LOGURU_LEVEL", "CRITICAL")  # datatrove tells all in its log files

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from tqdm import tqdm

from .tokenization import LOCKS, TokenizationError, prepare
from .tokenization_options import Machine, Options

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalExecutor(LocalPipelineExecutor):
    """Datatrove's, silent on the console, and with one process at a time for a task.

    Killed alone, this process leaves its workers at their tasks; another launch waits for them.
    """

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        lock = Path(self.logging_dir.path, LOCKS, f"{rank:05d}")
        lock.parent.mkdir(exist_ok=True)
        with lock.open("w") as file, contextlib.redirect_stderr(io.StringIO()):
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            return super()._run_for_rank(rank, local_rank, node_rank)


def _make_executor(
    machine: Machine, pipeline: list[PipelineStep], name: str, tasks: int, logs: Path
) -> PipelineExecutor:
    common: dict[str, Any] = {"tasks": tasks, "logging_dir": str(logs)}
    if machine.executor == "local":
        workers = min(tasks, machine.workers or CORES)
        # each worker tokenizes with its part of the cores
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, CORES // workers)))
        # imported once and not by each worker
        multiprocess.get_context("forkserver").set_forkserver_preload([prepare.__module__, "tyro"])
        return LocalExecutor(pipeline, workers=workers, **common)
    common |= {
        "workers": machine.workers or -1,
        "cpus_per_task": machine.cpus_per_task,
        "mem_per_cpu_gb": machine.gigabytes_per_cpu,
    }
    if machine.executor == "ray":
        return RayPipelineExecutor(pipeline, **common)
    if not machine.partition:
        raise TokenizationError("the executor slurm needs a --partition")
    return SlurmPipelineExecutor(
        pipeline,
        time=machine.time,
        partition=machine.partition,
        qos=machine.qos,
        sbatch_args=machine.sbatch,
        job_name=f"tst-{name}",
        **common,
    )


@contextlib.contextmanager
def _progress(description: str, tasks: int, logs: Path, folder: Path) -> Iterator[None]:
    """A bar of the tasks done, and what is written so far."""
    done = threading.Event()

    def watch() -> None:
        with tqdm(total=tasks, unit=" tasks", desc=description, file=sys.__stderr__) as bar:
            finished, pause = False, 1.0
            while not finished:
                finished, began = done.wait(pause), time.monotonic()
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    written = sum(path.stat().st_size for path in folder.rglob("*.ds"))
                    bar.set_postfix_str(f"{written / 1e6:,.0f} MB of tokens")
                bar.update(len(list((logs / "completions").glob("*"))) - bar.n)
                # 5% of the time, as there may be 100,000 shards to look at
                pause = max(1.0, 20 * (time.monotonic() - began))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _run(machine: Machine, executors: list[PipelineExecutor], folder: Path) -> None:
    """The executors, one after the other."""
    if machine.executor == "slurm":
        first, last = executors
        last.depends = first
        last.run()
        return
    for executor, description in zip(executors, ("Tokenizing", "Finishing"), strict=True):
        logs = Path(executor.logging_dir.path)
        with _progress(description, executor.world_size, logs, folder):
            try:
                executor.run()
            except ValueError as error:  # such as of datasets, for a name that the hub has not
                raise TokenizationError(str(error)) from error
        if failed := executor.get_incomplete_ranks(skip_completed=True):
            raise TokenizationError(f"tasks {failed} failed; their logs are in {logs}/logs")


def tokenize(source: str, folder: Path, options: Options, machine: Machine) -> bool:
    """Tokenize what is left to do of a corpus, or submit it.

    Args:
        source: as :func:`.tokenization.prepare` takes it.
        folder: for the shards.
        options: how to tokenize.
        machine: where to do it.

    Returns:
        Whether there was anything to do.

    Raises:
        TokenizationError: for a source or options that cannot be, or a task that failed.
        ShardError: for a folder with other shards.
    """
    executors = prepare(source, folder, options, functools.partial(_make_executor, machine))
    if executors:
        _run(machine, executors, folder)
    return bool(executors)
