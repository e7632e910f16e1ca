"""``tst train``: a job is checked, and then this process becomes its launcher."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.distributed import run as torchrun

import launches
from jobs import IN_STAGES, ON, ROOT, TST, UPSTREAM, column, superposition
from launches import modules_run, recording_modules
from torchtitan.experiments.tst import start
from torchtitan.experiments.tst.metrics_file import read_metrics
from torchtitan.experiments.tst.resilience.stop import STOP_SIGNALS, STOPPED_EXIT_CODE

LAUNCH = "torchtitan.experiments.tst.launch"


@pytest.fixture
def started(monkeypatch):
    """What this process would have become, and the signals that it would have blocked."""
    found = []

    def become(program, command):
        assert program == command[0] == sys.executable
        found.append((command[1:], signal.pthread_sigmask(signal.SIG_BLOCK, [])))

    def fail(number, frame):
        pytest.fail("the signal is not handled")

    monkeypatch.setattr(start.os, "execv", become)
    handlers = {number: signal.signal(number, fail) for number in STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield found
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def launcher(processes, log_rank, module, arguments):
    return [
        *("-m", LAUNCH, f"--nproc_per_node={processes}", "--rdzv_backend=c10d"),
        *("--rdzv_endpoint=localhost:0", f"--local-ranks-filter={log_rank}", "--role=rank"),
        *("--tee=3", "-m", module, *arguments),
    ]


def test_a_job_that_can_run_is_handed_to_the_launcher(tst, job, base_args, started):
    result = tst("train", job, *base_args, *ON, "--nproc=2")
    assert result == (0, "", "")
    ((command, blocked),) = started
    assert command == launcher(2, "0", TST, [f"--job.config_file={job}", *base_args, *ON])
    assert blocked >= set(STOP_SIGNALS), "until the launcher listens"


@pytest.mark.parametrize(("devices", "processes"), [(0, 2), (3, 3)])
def test_a_process_for_each_gpu_or_two_on_cpu(
    tst, job, base_args, started, monkeypatch, devices, processes
):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    assert tst("train", job, *base_args).code == 0
    ((command, _),) = started
    assert f"--nproc_per_node={processes}" in command


def test_arguments_reach_the_module_as_they_are(tst, tmp_path, started):
    """Of another module than this package's, which is not checked."""
    job = tmp_path / "none.toml"
    arguments = [
        *("--job.description=two  words", "--token_shards.paths", "a b", "c", "--optimizer.lr"),
        *("-1", "--training.steps=5", "--model.print-after-conversion", '--x.y="$HOME" *\n'),
    ]
    options = ["--log-rank=0,1", f"--module={UPSTREAM}"]
    result = tst("train", "--nproc", "3", job, *options, *arguments)
    assert result == (0, "", "")
    ((command, _),) = started
    arguments = [f"--job.config_file={job}", *arguments]
    assert command == launcher(3, "0,1", UPSTREAM, arguments)
    parsed = torchrun.parse_args(command[2:])  # as the launcher takes them
    assert (parsed.module, parsed.training_script) == (True, UPSTREAM)
    assert parsed.training_script_args == arguments
    assert (parsed.nproc_per_node, parsed.local_ranks_filter) == ("3", "0,1")


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--training.stepz=3"], "config error: training.stepz = '3': unknown key"),
        (
            ["--training.global_batch_size=8"],
            "config error: training.global_batch_size = 8: must be a multiple of 16 "
            "(training.local_batch_size = 4 on each of 4 data-parallel ranks)",
        ),
        (["--training.dataset_path=/none"], "config error: training.dataset_path = '/none': "),
        (
            ["--checkpoint.enable", "--checkpoint.load_step=3"],
            "checkpoint error: checkpoint.load_step = 3: ",
        ),
        (["--job.config_file=b.toml"], "error: --job.config_file=b.toml: the job is "),
    ],
)
def test_a_job_that_cannot_run_is_not_started(tst, job, base_args, started, tmp_path, args, error):
    run = tmp_path / "run"
    folder = f"--job.dump_folder={run}"
    result = tst("train", job, "--nproc=4", *base_args, *ON, folder, *args)
    assert result.code == 2
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line.startswith(error)
    assert not started and not run.exists()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_it_checks_ends_it(tst, job, base_args, started, monkeypatch, number):
    """With the exit code of a job that has stopped: nothing is lost."""
    check = start.check

    def signalled(*args):
        os.kill(os.getpid(), number)
        return check(*args)

    monkeypatch.setattr(start, "check", signalled)
    assert tst("train", job, *base_args) == (STOPPED_EXIT_CODE, "", "")
    assert not started


@pytest.mark.parametrize(
    ("in_stages", "bag_sizes"),
    [
        (ON, [4, 1]),
        (IN_STAGES, [4, 2, 3, 1]),
        (superposition("4,2,3", "1,0,1"), [4, 3, 1]),
        ((), [1]),
    ],
    ids=["one stage", "stages", "a stage without steps", "none"],
)
def test_a_job_is_played(tst, job, base_args, started, monkeypatch, tmp_path, in_stages, bag_sizes):
    """By rank 0 of 4, in a folder of its own, from whatever the job would load."""
    run, played = tmp_path / "run", []

    def play(command, env):
        assert command[:3] == [sys.executable, "-m", TST]
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "NGPU": "4"}
        assert variables.items() <= env.items()
        *_, folder = (arg for arg in command if arg.startswith("--job.dump_folder="))
        folder = Path(folder.partition("=")[2])
        assert folder.is_dir()
        found = launches.fork(TST, command[3:], 1, tmp_path / "launch", **variables)
        played.append((folder, launches.succeeded(found).output, read_metrics(folder)))
        return types.SimpleNamespace(returncode=3)

    monkeypatch.setattr(start.subprocess, "run", play)
    loads = ("--checkpoint.enable", "--checkpoint.load_step=3", f"--job.dump_folder={run}")
    loads += ("--superposition.checkpoint_each_stage",)
    result = tst(
        *("train", job, "--nproc=4", *base_args, *in_stages, *loads),
        *("--training.steps=1000", "--comm.mode=fake_backend"),
    )
    assert result == (3, "", "")
    ((folder, output, metrics),) = played
    assert column(metrics, "bag_size") == bag_sizes
    assert "dp_shard=4" in output
    assert not started and not run.exists() and not folder.exists()


def test_a_job_of_another_module_is_played_by_it(tst, job, started, monkeypatch):
    played = []

    def play(command, env):
        played.append((command[2], env["WORLD_SIZE"]))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(start.subprocess, "run", play)
    result = tst("train", job, "--nproc=8", "--module=my.train", "--comm.mode=fake_backend")
    assert result == (0, "", "")
    assert played == [("my.train", "8")] and not started


def test_a_job_of_two_processes(job, base_args, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torchtitan.experiments.tst", "train", job, "--nproc=2"]
    steps = ["--training.steps=2", "--superposition.bag_size=4", "--superposition.steps=1"]
    result = subprocess.run(
        [*command, *base_args, *steps, f"--job.dump_folder={run}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | recording_modules(tmp_path / "site"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    assert column(read_metrics(run), "phase") == ["superposition", "recovery"]
    assert "dp_shard=2" in result.stdout
    assert "[rank0]:" in result.stdout and "[rank1]:" not in result.stdout
    assert modules_run(tmp_path / "site") == ["torchtitan.experiments.tst", LAUNCH, TST, TST]


def test_an_error_of_four_processes_is_said_once(job, base_args, tmp_path):
    """To a process of its own, where all that libraries write is seen."""
    command = [sys.executable, "-m", "torchtitan.experiments.tst", "train", job, "--nproc=4"]
    result = subprocess.run(
        [*command, *base_args, "--training.global_batch_size=8"],
        cwd=ROOT,
        env=os.environ | recording_modules(tmp_path / "site"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    (line,) = result.stdout.splitlines()
    assert line.startswith("config error: training.global_batch_size = 8: must be a multiple of 16")
    assert modules_run(tmp_path / "site") == ["torchtitan.experiments.tst"]
