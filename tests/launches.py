"""Launches of several processes: forked from one that has imported everything, or by torchrun."""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist
from torchtitan.config import ConfigManager

from jobs import ROOT
from torchtitan.experiments.tst.resilience.checkpoint.inventory import complete_steps
from torchtitan.experiments.tst.testing import ranks
from torchtitan.experiments.tst.testing.processes import signal_tree


class Launch(NamedTuple):
    """What has become of a launch: whether a process failed, and what all of them wrote."""

    failed: bool
    output: str


def fork(module: str, args: list[str], processes: int, folder: Path, **environment: str) -> Launch:
    """Run a module in so many processes, as torchrun does, without the seconds of imports.

    Args:
        module: its name, or the path of a script in the repository.
        args: of the command line.
        processes: how many.
        folder: of their logs.
        environment: variables that they have in addition.
    """
    failure = ranks.run_ranks(run_module, processes, folder, module, args, environment)
    logs = (folder / ranks.LOG.format(rank=rank) for rank in range(processes))
    return Launch(failure is not None, "".join(log.read_text() for log in logs))


def start(module: str, args: list[str], folder: Path) -> ForkServerProcess:
    """Start a module as :func:`fork` does, in one process, and do not wait for its end."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    process = ranks.process_of_rank(0, 1, store, folder, run_module, module, args)
    process.start()
    process.store = store  # as long as there is the process
    return process


def run_module(module: str, args: list[str], environment: Mapping[str, str] = {}) -> None:
    """Run a module in this process, one that was forked for it."""
    os.environ |= environment
    os.chdir(ROOT)
    sleep = time.sleep  # upstream waits 2 seconds for others at the end; torchrun polls by it
    time.sleep = lambda seconds: sleep(min(seconds, 0.1))
    sys.argv = [module, *args]
    ConfigManager.parse_args.__defaults__ = (args,)  # upstream's, of when it was imported
    if module.endswith(".py"):
        sys.path.insert(0, str(Path(module).parent))
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def in_group(function: Callable[..., None], *args: object) -> None:
    """Call a function in a process group."""
    dist.init_process_group("gloo")
    function(*args)
    dist.destroy_process_group()


def torchrun(command: list[str], processes: int) -> Launch:
    """Run a command line, which begins with a module, under torchrun."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"),
            *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "-m", *command),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Launch(result.returncode != 0, result.stdout + result.stderr)


RECORDER = """\
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

if "-m" in sys.orig_argv[:3]:
    with Path(__file__).with_name("modules").open("a") as file:
        print(sys.orig_argv[sys.orig_argv.index("-m") + 1], file=file)
path = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
if spec := PathFinder.find_spec(__name__, path):  # that there is without this one
    spec.loader.exec_module(module_from_spec(spec))
"""


def recording_modules(folder: Path) -> dict[str, str]:
    """Variables under which every ``python -m MODULE`` is written down, for :func:`modules_run`.

    Args:
        folder: of the record.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(RECORDER)
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


def modules_run(folder: Path) -> list[str]:
    """What processes under :func:`recording_modules` have run, one after the other."""
    return (folder / "modules").read_text().splitlines()


def succeeded(launch: Launch) -> Launch:
    """Fails the test with the output of a launch that failed."""
    if launch.failed:
        pytest.fail(launch.output[-12_000:])
    return launch


def wait_until(happened: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for an event; fails the test if it does not happen in so many seconds."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not in {seconds:.0f} s"
        time.sleep(0.02)


def signal_every_process(rank: list[str], run: Path, number: int) -> tuple[int, str]:
    """Start a job, and signal all its processes after its second checkpoint, as Slurm does.

    Args:
        rank: what the launcher starts, with its arguments.
        run: the run folder.
        number: of the signal.

    Returns:
        Exit code and output.
    """
    launcher = [sys.executable, "-m", "torchtitan.experiments.tst.launch", "--nproc_per_node=1"]
    process = subprocess.Popen(
        [*launcher, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *rank],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begin = time.monotonic()
    while len(complete_steps(run / "checkpoint")) < 2 and process.poll() is None:
        if time.monotonic() - begin > 150:
            break
        time.sleep(0.05)
    signal_tree(process.pid, number)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:  # it hangs
            signal_tree(process.pid, signal.SIGKILL)
    return process.returncode, output
