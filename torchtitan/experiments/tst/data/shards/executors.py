"""Run a tokenization on this machine, Slurm or Ray, with datatrove's executors."""

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

os.environ.setdefault("LOGURU_LEVEL", "CRITICAL")  # datatrove also writes log files

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
    """Datatrove's local executor, silent on the console, with one process at a time for a task.

    If only this process is killed, its workers finish their tasks. Another launch waits for them.
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
    """Return the executor that the machine names, for a pipeline."""
    common: dict[str, Any] = {"tasks": tasks, "logging_dir": str(logs)}
    if machine.executor == "local":
        workers = min(tasks, machine.workers or CORES)
        # Each worker tokenizes with its share of the cores.
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, CORES // workers)))
        # Import these once, not in each worker.
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
        raise TokenizationError("--executor slurm needs --partition, the partition of the jobs")
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
    """Show a bar of the finished tasks, and how much is written so far."""
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
                # At most 5% of the time: there may be 100,000 shards to look at.
                pause = max(1.0, 20 * (time.monotonic() - began))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _run(machine: Machine, executors: list[PipelineExecutor], folder: Path) -> None:
    """Run the executors, one after the other."""
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
            except ValueError as error:  # such as a name that the hub does not have
                raise TokenizationError(str(error)) from error
        if failed := executor.get_incomplete_ranks(skip_completed=True):
            raise TokenizationError(
                f"tasks {failed} failed; read their logs in {logs}/logs, and run the command again "
                "to continue"
            )


def tokenize(source: str, folder: Path, options: Options, machine: Machine) -> bool:
    """Tokenize a corpus, or the unfinished rest of it; on Slurm, submit the jobs.

    Args:
        source: the corpus, as for :func:`.tokenization.prepare`.
        folder: folder for the shards.
        options: how to tokenize.
        machine: where to tokenize.

    Returns:
        Whether there was anything left to do.

    Raises:
        TokenizationError: if the source or the options are wrong, or a task failed.
        ShardError: if the folder has damaged shards.
    """
    executors = prepare(source, folder, options, functools.partial(_make_executor, machine))
    if executors:
        _run(machine, executors, folder)
    return bool(executors)
