"""Tokenize a corpus once, to token shards that training reads as fast as the disk gives them.

Explained by ``python scripts/tokenize_corpus.py --help``.
"""

import contextlib
import fcntl
import functools
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("LOGURU_LEVEL", "CRITICAL")  # datatrove tells all in its log files

import multiprocess
import tyro
from datatrove.executor import (
    LocalPipelineExecutor,
    RayPipelineExecutor,
    SlurmPipelineExecutor,
)
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from tqdm import tqdm

from torchtitan.experiments.tst.data.shards import ShardError
from torchtitan.experiments.tst.data.tokenization import (
    LOCKS,
    Options,
    TokenizationError,
    prepare,
    read_corpus_file,
)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Machine:
    """Where the work is done, which does not change the shards."""

    executor: Literal["local", "slurm", "ray"] = "local"
    """This machine; job arrays that are submitted from here; a Ray cluster that is running."""

    workers: int | None = None
    """Tasks at the same time. By default, locally as many as there are cores, else no limit."""

    partition: str | None = None
    """Slurm: where the jobs run."""

    time: str = "24:00:00"
    """Slurm: the limit of a task."""

    qos: str | None = None
    """Slurm: quality of service."""

    sbatch: dict[str, str] = field(default_factory=dict)
    """Slurm: further options, such as account NAME."""

    cpus_per_task: int = 1
    """Slurm and Ray."""

    gigabytes_per_cpu: int = 4
    """Slurm and Ray: memory."""


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


def make_executor(
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
def progress(description: str, tasks: int, logs: Path, folder: Path) -> Iterator[None]:
    """A bar of the tasks done, and what is written so far."""
    done = threading.Event()

    def watch() -> None:
        with tqdm(total=tasks, unit=" tasks", desc=description, file=sys.__stderr__) as bar:
            finished = False
            while not finished:
                finished = done.wait(1)
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    written = sum(path.stat().st_size for path in folder.rglob("*.ds"))
                    bar.set_postfix_str(f"{written / 1e6:,.0f} MB of tokens")
                bar.update(len(list((logs / "completions").glob("*"))) - bar.n)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def run(machine: Machine, executors: list[PipelineExecutor], folder: Path) -> None:
    """The executors, one after the other."""
    if machine.executor == "slurm":
        first, last = executors
        last.depends = first
        last.run()
        return
    for executor, description in zip(executors, ("Tokenizing", "Finishing"), strict=True):
        logs = Path(executor.logging_dir.path)
        with progress(description, executor.world_size, logs, folder):
            executor.run()
        if failed := executor.get_incomplete_ranks(skip_completed=True):
            raise TokenizationError(f"tasks {failed} failed; their logs are in {logs}/logs")


def main(
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]],
    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]],
    options: Options,
    machine: Machine,
) -> None:
    """Tokenize a corpus once, to token shards that training reads as fast as the disk gives them.

    The tokens of a document are those that tokenizing while training gives. Launched again with
    the same arguments after it was cut short, it goes on. datatrove does the work; its logs, and
    what became of each task, are in FOLDER/logs.

    Args:
        source: JSON lines (also .gz and .zst) or Parquet: a file, a folder, a pattern in quotes,
            or a URL such as hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT. Or the name of a
            dataset on the Hugging Face hub, such as allenai/c4.
        folder: For the shards, to be training.dataset_path.
        options: How to tokenize.
        machine: Where to do it.
    """
    folder, begin = folder.absolute(), time.perf_counter()
    try:
        executors = prepare(source, folder, options, functools.partial(make_executor, machine))
        if executors:
            run(machine, executors, folder)
    except (TokenizationError, ShardError) as error:
        sys.exit(f"error: {error}")
    content = read_corpus_file(folder)
    if not content["complete"]:
        print(f"Submitted. {folder} is complete when corpus.json there says so")
        return
    print(
        f"{folder} is complete: {content['documents']:,} documents, {content['tokens']:,} tokens "
        f"in {len(content['shards'])} shards; {content['dropped_tokens']:,} tokens dropped"
    )
    if executors:
        seconds = time.perf_counter() - begin
        print(f"{seconds:.0f} s, {content['tokens'] / seconds / 1e6:.2f}M tokens/s")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
