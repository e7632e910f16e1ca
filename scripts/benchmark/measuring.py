"""Tools of the benchmarks: interleaved rounds, peak memory, results as table and JSON."""

import json
import math
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))  # the other scripts
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would write to the console

import numpy as np
import torch
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from torch.profiler import ProfilerActivity, profile
from torchtitan.tools import utils

from torchtitan.experiments.tst import models
from torchtitan.experiments.tst.data.text import datasets
from torchtitan.experiments.tst.results.tables import aligned
from torchtitan.experiments.tst.upstream.cpu import enable_cpu_if_alone

enable_cpu_if_alone()
models.register()
datasets.register()
device_module, device_type = utils.device_module, utils.device_type

Run = Callable[[], object]


@dataclass
class Measurement:
    """The measurement of one contestant.

    Attributes:
        seconds: seconds of each round.
        peak_bytes: peak memory minus the memory that was in use before.
        out_of_memory: whether it ran out of memory, so that there are no times.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    out_of_memory: bool = False

    @property
    def median(self) -> float:
        """Median of the seconds; NaN without times."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    def ratio(self, other: "Measurement") -> float:
        """Return the median ratio of its times to the other's times of the same rounds."""
        if self.out_of_memory or other.out_of_memory:
            return math.nan
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def json(self) -> dict[str, Any]:
        """Return the measurement for a JSON file."""
        return {"median_seconds": self.median if self.seconds else None, **self.__dict__}


def measure(
    runs: dict[str, Run], rounds: int, warmup: int = 2, prepare: Run = lambda: None
) -> dict[str, Measurement]:
    """Measure the memory of each run once, then its times: each round has all runs in random order.

    If a run is out of memory, the others are still measured.

    Args:
        runs: functions to measure, by name.
        rounds: number of rounds.
        warmup: number of calls of each run before the measurement.
        prepare: called before each run; it is not measured.
    """
    results = {name: Measurement() for name in runs}

    def attempt(name: str, what: Callable[[Run], Any]) -> Any:
        prepare()
        try:
            return what(runs[name])
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", file=sys.stderr)
            results[name] = Measurement(out_of_memory=True)
        device_module.empty_cache()  # only here, because the traceback holds tensors
        return None

    def left() -> list[str]:
        return [name for name in runs if not results[name].out_of_memory]

    for name in runs:
        for _ in range(warmup):
            if name in left():
                attempt(name, lambda run: run())
        if name in left() and (peak := attempt(name, peak_bytes)) is not None:
            results[name].peak_bytes = peak
    order = random.Random(0)  # the same on all ranks
    for round_ in range(rounds):
        names = left()
        for name in order.sample(names, len(names)):
            if (time_taken := attempt(name, seconds)) is not None:
                results[name].seconds.append(time_taken)
        if sys.stderr.isatty():
            end = "\n" if round_ == rounds - 1 else "\r"
            print(f"round {round_ + 1} of {rounds}", end=end, file=sys.stderr)
    return results


def seconds(run: Run) -> float:
    """Return the seconds of one run, including the work of the device."""
    device_module.synchronize()
    begin = time.perf_counter()
    run()
    device_module.synchronize()
    return time.perf_counter() - begin


def peak_bytes(run: Run) -> int:
    """Return the peak memory of a run minus the memory before, as counted by the allocator."""
    if device_type != "cpu":
        device_module.synchronize()
        device_module.reset_peak_memory_stats()
        before = device_module.memory_allocated()
        run()
        device_module.synchronize()
        return device_module.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def compile_for_each_shape() -> None:
    """Make torch.compile generate code for each shape that it sees.

    Contestants share code. Otherwise torch would compile it for dynamic shapes as soon as it sees a
    second shape, and stop compiling after eight. The measured kernels would differ from those of a
    job with one shape.
    """
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024


def hardware() -> dict[str, Any]:
    """Return the facts of the machine for a JSON file."""
    if device_type == "cpu":
        name = platform.processor() or platform.machine()
        cpus = Path("/proc/cpuinfo")
        if cpus.exists():
            lines = cpus.read_text().splitlines()
            models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
            name = models[0] if models else name
        name = f"{torch.get_num_threads()} cores, {name}"
    else:
        name = device_module.get_device_name()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text."""
    return "\n".join(aligned([header, *rows]))


def write_results(folder: Path, name: str, text: str, results: dict[str, Any]) -> None:
    """Print a table, and write the table and its numbers to files."""
    machine = hardware()
    command = shlex.join(["python", *sys.argv])
    heading = f"{command}\n{machine['device']}, torch {machine['torch']}\n\n"
    print(heading + text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(heading + text + "\n")
    content = {"command": command, **machine, **results}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nWritten to {folder}/{name}.*")


def write_shard(folder: Path, documents: Iterable[np.ndarray], tokenizer: str) -> None:
    """Write a folder with one token shard with datatrove, 4 bytes a token."""
    file = TokenizedFile(
        str(folder),
        "00000.ds",
        tokenizer_name_or_path=tokenizer,
        save_final_metadata=True,
        token_size=4,
    )
    for document in documents:
        file.write_bytes(document.astype("<u4").tobytes())
    file.close()


def be_the_only_process() -> None:
    """Set the environment of a launch with one process, unless ``torchrun`` has set it."""
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
