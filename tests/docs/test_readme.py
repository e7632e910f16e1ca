"""The commands and the code of the README and of docs/running.md run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn

import documents
import launches
from jobs import ON, ROOT, SAVE, column
from torchtitan.experiments.tst import launch, start
from torchtitan.experiments.tst.metrics_file import read_metrics

README = documents.page("README.md")
RUNNING = documents.page("docs/running.md")
SHORT = ["--training.steps=12", "--validation.freq=6", "--validation.steps=1"]
SHORT += ["--metrics.log_freq=2"]


PYTHON = f"""#!/usr/bin/env bash
# Stands for python: writes down what is run of the package, and does the rest.
if [[ $2 == torchtitan.experiments.tst || $2 == torchtitan.experiments.tst.* ]]; then
    printf '%s\\t' "$@" >> "$RECORD"
    echo >> "$RECORD"
else
    exec {sys.executable} "$@"
fi
"""


@pytest.fixture
def shell(tmp_path):
    """Run a command line in the repository, in this environment; its run folder is temporary."""

    def run(line: str, *args: str, **variables: str) -> Path:
        words, folder = shlex.split(line), tmp_path / "run"
        environment = os.environ | {
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        while "=" in words[0] and not words[0].startswith("-"):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        command = [*words, *args]
        if words[0].endswith("run_train.sh"):
            command.append(f"--job.dump_folder={folder}")
        environment |= variables
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
        return folder

    return run


class Started(NamedTuple):
    """What has been started: a module, how often, and variables that it has in addition."""

    module: str
    arguments: list[str]
    processes: int
    environment: dict[str, str]


@pytest.fixture
def started(monkeypatch) -> list[Started]:
    """What ``tst train`` in this process would start; nothing is."""
    found = []

    def become_launcher(_, command):
        *launcher, module = command[: command.index("-m", 3) + 2]
        (processes,) = re.findall(r"--nproc_per_node=(\d+)", " ".join(launcher))
        found.append(Started(module, command[len(launcher) + 1 :], int(processes), {}))
        sys.exit()

    def play(command, env):
        variables = dict(env.items() - os.environ.items())
        found.append(Started(command[2], command[3:], 1, variables))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(launch, "os", SimpleNamespace(environ=os.environ, execv=become_launcher))
    monkeypatch.setattr(start, "subprocess", SimpleNamespace(run=play))
    monkeypatch.setattr(launch, "signal", mock.Mock())  # the signals are this process's
    return found


@pytest.fixture
def launched(shell, tst, started, tmp_path):
    """As ``shell``, but ``tst`` runs in this process, and what it starts is forked."""

    def run(line: str, *args: str) -> tuple[Path, str]:
        python, record = tmp_path / "bin" / "python", tmp_path / "record"
        python.parent.mkdir()
        python.write_text(PYTHON)
        python.chmod(0o755)
        path = f"{python.parent}:{os.environ['PATH']}"
        folder, output = shell(line, *args, PATH=path, RECORD=str(record)), ""
        for words in record.read_text().splitlines():
            _, module, *arguments = words.rstrip("\t").split("\t")
            before = len(started)
            if module == start.__package__:
                output += succeeded(tst(*arguments))
            else:
                started.append(Started(module, arguments, 1, {}))
            for number, (*what, environment) in enumerate(started[before:], before):
                forked = launches.fork(*what, tmp_path / f"logs-{number}", **environment)
                output += launches.succeeded(forked).output
        return folder, output

    return run


def succeeded(result) -> str:
    """The output of a command; fails the test if the command failed."""
    assert result.code == 0, result.stderr
    return result.stdout


def test_demo(shell):
    run = shell("./run_train.sh", *SHORT)
    assert (run / "loss.png").stat().st_size > 10_000
    assert (run / "checkpoint" / "step-4").is_dir()  # the boundary: 0.3 of 12 steps
    waiting = column(read_metrics(run), "time_metrics/data_loading(%)")
    assert min(waiting) < 5, "tokenizing took 10 % of the time, shards take about 0.1 %"


def test_baseline(launched):
    run, _ = launched("CONFIG_FILE=train_configs/demo/baseline.toml ./run_train.sh", *SHORT)
    assert (run / "loss.png").stat().st_size > 10_000
    assert not (run / "checkpoint" / "step-4").exists()


def test_debug(launched, started, tst, tmp_path):
    short = ["--superposition.steps=2", "--training.steps=4", "--validation.freq=2"]
    job = "train_configs/debug/qwen3_moe.toml"
    folder = f"--job.dump_folder={tmp_path / 'run'}"
    succeeded(tst("train", job, "--nproc", 4, "--superposition.bag_size", 8, *short, folder))
    run, _ = launched(f"CONFIG_FILE={job} NGPU=4 ./run_train.sh --superposition.bag_size 8", *short)
    assert set(column(read_metrics(run), "bag_size")) == {1, 8}
    by_tst, by_run_train = started
    of_job = by_run_train.arguments[0].replace(f"{ROOT}/", "")  # the two are the same job
    assert by_tst == by_run_train._replace(arguments=[of_job, *by_run_train.arguments[1:]])


def test_help(launched):
    assert "--superposition.bag-size" in launched("NGPU=1 ./run_train.sh --help")[1]


def test_fake_backend(launched):
    run, output = launched(
        "COMM_MODE=fake_backend NGPU=64 CONFIG_FILE=train_configs/debug/llama3.toml ./run_train.sh"
    )
    assert "dp_shard=64" in output
    assert not run.exists()  # leaves the run's folder alone


def test_compare(tst, finished, tmp_path):
    runs = finished(*ON, *SAVE).folder, finished().folder
    output = tmp_path / "comparison"
    succeeded(tst("compare", *runs, "--output", output))
    assert f"{runs[0].name} is" in (output / "report.html").read_text()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("tst check train_configs/demo/tst.toml", "all checks passed"),
        (
            "tst plan train_configs/demo/tst.toml",
            "Batch: 64 sequences = 1 data-parallel ranks x 32 x 2",
        ),
        ("tst dry-run train_configs/demo/tst.toml", "superposition (s=4) 0.1 GB; recovery 0.1 GB"),
        (
            "tst diff train_configs/paper/3B-20k-baseline.toml train_configs/paper/3B-20k-tst.toml",
            "4 differences, all of them allowed",
        ),
    ],
)
def test_before_a_run(tst, tmp_path, line, shown):
    folder = [f"--job.dump_folder={tmp_path}"] if "check" in line else []
    assert shown in succeeded(tst(*shlex.split(line)[1:], *folder))


def test_your_own_job(tst, started, corpus, tmp_path):
    """TorchTitan's debug job, with the lines of the README, is checked, planned and launched."""
    job, (toml,) = tmp_path / "job.toml", documents.blocks(README, "toml")
    debug = (ROOT / "train_configs/debug/llama3.toml").read_text()
    ordinary = re.sub(r"\[superposition\]\n(?:.+\n)+", "", debug)
    ordinary = ordinary.replace("./outputs/demo/corpus", str(corpus))
    job.write_text(ordinary)
    assert "superposition" not in succeeded(tst("plan", job))
    job.write_text(ordinary + toml)
    folder = f"--job.dump_folder={tmp_path / 'run'}"
    assert "all checks passed" in succeeded(tst("check", job, folder))
    assert "superposition" in succeeded(tst("plan", job))
    succeeded(tst("train", job, "--nproc", 8, folder))
    assert started[0].processes == 8


def test_train(tst, started, tmp_path):
    line = "tst train train_configs/demo/tst.toml"
    succeeded(tst(*shlex.split(line)[1:], f"--job.dump_folder={tmp_path}"))
    ((module, arguments, processes, _),) = started
    assert (module, processes) == ("torchtitan.experiments.tst.train", 2)
    assert arguments[0] == "--job.config_file=train_configs/demo/tst.toml"


def test_command_for_tests(shell):
    shell("scripts/test.sh --version")


# What README.md and docs/running.md tell the reader to run, and what tries it
TRIED = {
    "./run_train.sh": test_demo,
    "CONFIG_FILE=train_configs/demo/baseline.toml ./run_train.sh": test_baseline,
    "tst compare outputs/demo/tst outputs/demo/baseline "
    "--output outputs/demo/comparison": test_compare,
    "./run_train.sh --help": test_help,
    'pip install ".[demo]"': "scripts/venv.sh",
    "tst configs copy .": "commands/test_configs.py",
    "tst core copy my_project/tst_core": "commands/test_core.py",
    "tst conformance conformance_of_my_loop.py": "commands/test_conformance_command.py",
    "tst check job.toml": test_your_own_job,
    "tst plan job.toml": test_your_own_job,
    "tst train job.toml --nproc 8": test_your_own_job,
    "tst check train_configs/demo/tst.toml": test_before_a_run,
    "tst train train_configs/demo/tst.toml": test_train,
    "tst train JOB.toml": test_train,
    "tst COMMAND --help": "commands/test_modules.py",
    "CONFIG_FILE=train_configs/debug/qwen3_moe.toml NGPU=4 ./run_train.sh "
    "--superposition.bag_size 8": test_debug,
    "tst train train_configs/debug/qwen3_moe.toml --nproc 4 --superposition.bag_size 8": test_debug,
    "COMM_MODE=fake_backend NGPU=64 CONFIG_FILE=train_configs/debug/llama3.toml "
    "./run_train.sh": test_fake_backend,
    "scripts/test.sh": test_command_for_tests,
    "python -m torchtitan.experiments.tst": "commands/test_running.py",
    "torchrun --nproc_per_node=8 -m torchtitan.experiments.tst.train "
    "--job.config_file job.toml": "test_parity.py",
    "python -m torchtitan.experiments.tst.upstream.cpu torchtitan.train "
    "--job.config_file job.toml": "test_parity.py",
    "scripts/check_gpu.sh": "test_check_gpu.py",
}


def test_every_command_is_tried():
    named = {*documents.commands(README), *documents.commands(RUNNING)}
    assert sorted(named) == sorted(TRIED)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_the_python_runs():
    (code,) = documents.blocks(README, "python")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok_embeddings = nn.Embedding(50, 8)
            self.output = nn.Linear(8, 50)

        def forward(self, tokens):
            return self.output(self.tok_embeddings(tokens))

    stream = torch.randint(50, (2, 25))
    names = {"model": Model(), "inputs": stream[:, :-1], "labels": stream[:, 1:]}
    exec(code, names)
    names["loss"].backward()
    assert names["inputs"].shape == (2, 4, 6)
