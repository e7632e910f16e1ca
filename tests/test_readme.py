"""The README is true: its paths exist, its commands run, its table is the config's."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn
from torchtitan.hf_datasets.text_datasets import DATASETS

import launches
from jobs import ON, ROOT, SAVE, column
from torchtitan.experiments.tst import start
from torchtitan.experiments.tst.commands import COMMANDS, running
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.config.sections import (
    JobConfig,
    LMHead,
    LoadBalance,
    Resilience,
    Superposition,
    TextDataset,
    TokenShards,
)
from torchtitan.experiments.tst.training.metrics import read_metrics

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text()
PACKAGE = ROOT / "torchtitan/experiments/tst"
JOB_SH = (ROOT / "scripts" / "job.sh").read_text()
SHORT = ["--training.steps=12", "--validation.freq=6", "--validation.steps=1"]
SHORT += ["--metrics.log_freq=2"]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    lines = [
        line.partition(" #")[0].strip()
        for block in blocks("bash", text)
        for line in block.replace("\\\n", "").splitlines()
    ]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(
        r"`((?:python|scripts/|\./)[^`\n]* [^`\n]*|tst [^`\s]+ [^`\n]+|scripts/[\w./]+\.sh)`", prose
    )
    return sorted({*lines, *inline})


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

    monkeypatch.setattr(start, "os", SimpleNamespace(environ=os.environ, execv=become_launcher))
    monkeypatch.setattr(start, "subprocess", SimpleNamespace(run=play))
    monkeypatch.setattr(start, "signal", mock.Mock())  # the signals are this process's
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


@pytest.fixture
def script(run_script):
    """Run the command line of a script in this process."""

    def run(line: str, *args: object) -> str:
        python, path, *words = shlex.split(line)
        assert python.endswith("python")
        name = path.removeprefix("scripts/").removesuffix(".py")
        return succeeded(run_script(name, *words, *args))

    return run


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


def test_benchmark_of_a_step(script, corpus, tokens, tmp_path):
    script(
        "python scripts/benchmark/step.py --rounds 3 --job.config_file train_configs/demo/tst.toml",
        *("--output", tmp_path, f"--training.dataset_path={tokens}"),
        *(f"--model.hf_assets_path={corpus / 'tokenizer'}", "--training.local_batch_size=4"),
    )
    assert (tmp_path / "step.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "step.json").read_text())["by_batch"]["4"]
    assert list(results) == [
        *("TorchTitan", "recovery", "superposition, s = 6", "superposition, s = 16")
    ]
    assert all(len(result["measurement"]["seconds"]) == 3 for result in results.values())


@torch._dynamo.config.patch(disable=True)
def test_benchmark_of_the_loss(script, tmp_path):
    script(
        "python scripts/benchmark/loss.py --rounds 1 --bag-sizes 1 2 --chunks 2 "
        "--positions 32 64 --vocab-size 1000 --width 64",
        *("--output", tmp_path),
    )
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert "bag loss, compiled, 2 chunks" in (tmp_path / "loss.txt").read_text()


def test_benchmark_of_data(corpus, tmp_path):
    """In a process of its own, which it binds to one core."""
    options = ["--rounds=1", "--seconds=0.1", "--tokens=300000", f"--corpus={corpus}"]
    shown = launches.succeeded(launches.fork("scripts/benchmark/data.py", options, 1, tmp_path))
    assert "tokens/s" in shown.output


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


def test_train(tst, started, tmp_path):
    line = "tst train train_configs/demo/tst.toml"
    succeeded(tst(*shlex.split(line)[1:], f"--job.dump_folder={tmp_path}"))
    ((module, arguments, processes, _),) = started
    assert (module, processes) == ("torchtitan.experiments.tst.train", 2)
    assert arguments[0] == "--job.config_file=train_configs/demo/tst.toml"


def test_command_for_tests(shell):
    shell("scripts/test.sh --version")


# What stands in the README, and what tries it
TRIED = {
    "./run_train.sh": test_demo,
    "CONFIG_FILE=train_configs/demo/baseline.toml ./run_train.sh": test_baseline,
    "tst compare outputs/demo/tst outputs/demo/baseline "
    "--output outputs/demo/comparison": test_compare,
    "./run_train.sh --help": test_help,
    'pip install ".[demo]"': "scripts/venv.sh",
    "tst configs copy .": "commands/test_configs.py",
    "tst check train_configs/demo/tst.toml": test_before_a_run,
    "tst plan train_configs/demo/tst.toml": test_before_a_run,
    "tst train train_configs/demo/tst.toml": test_train,
    "tst COMMAND --help": "commands/test_modules.py",
    "CONFIG_FILE=train_configs/debug/qwen3_moe.toml NGPU=4 ./run_train.sh "
    "--superposition.bag_size 8": test_debug,
    "tst train train_configs/debug/qwen3_moe.toml --nproc 4 --superposition.bag_size 8": test_debug,
    "COMM_MODE=fake_backend NGPU=64 CONFIG_FILE=train_configs/debug/llama3.toml "
    "./run_train.sh": test_fake_backend,
    "python scripts/benchmark/step.py --job.config_file train_configs/demo/tst.toml": (
        test_benchmark_of_a_step
    ),
    "python scripts/benchmark/loss.py": test_benchmark_of_the_loss,
    "python scripts/benchmark/data.py": test_benchmark_of_data,
    "tst diff train_configs/paper/3B-20k-baseline.toml "
    "train_configs/paper/3B-20k-tst.toml": test_before_a_run,
    "scripts/test.sh": test_command_for_tests,
    "pip install .": "test_packaging.py",
    "python -m torchtitan.experiments.tst": "commands/test_running.py",
    "torchrun --nproc_per_node=8 -m torchtitan.experiments.tst.train "
    "--job.config_file job.toml": "test_parity.py",
    "python -m torchtitan.experiments.tst.upstream.cpu torchtitan.train": "test_parity.py",
    "python -m torchtitan.train": "upstream's",
    "tst tokenize SOURCE FOLDER --tokenizer assets/hf/Llama-3.1-8B": "data/test_tokenization.py",
    "CONFIG_FILE=train_configs/paper/3B-20k-tst.toml sbatch --nodes=8 --gpus-per-node=8 "
    "--exclusive scripts/slurm/train.sbatch": "test_batch_scripts.py",
    "tst export outputs/demo/tst outputs/demo/hf": "test_export.py",
    "tst evaluate outputs/demo/hf": "test_export.py",
    'tst sample outputs/demo/tst --prompt "def main("': "test_export.py",
    "python scripts/replicate.py": "results/test_replication.py",
    "python scripts/check_parallelism.py": "test_check_parallelism.py",
    "python scripts/mutate.py": "test_mutate.py",
    "scripts/check_gpu.sh": "test_check_gpu.py",
    "scripts/slurm/try.sh": "the command itself",
    "scripts/lint.sh": ".ci/run",
    "scripts/test.sh -m slow": "the command itself",
    "scripts/test.sh -m gpu": "the command itself",
}


def test_every_command_is_tried():
    assert commands(README) == sorted(TRIED)


def test_commands_of_the_documents_are_understood(monkeypatch):
    understood: list[str] = []
    names = list(chain(*COMMANDS.values()))

    def recorded(name: str, main: Callable[..., None]) -> Callable[..., None]:
        return wraps(main)(lambda *args, **options: understood.append(name))  # read by tyro

    for name in names:
        module = running._module(name)
        monkeypatch.setattr(module, "main", recorded(name, module.main))
    expected = []
    for document in DOCUMENTS:
        text = document.read_text()
        assert {*re.findall(r"`tst ([a-z-]+)[ `]", text)} <= {*names}, document.name
        for line in commands(text):
            tst, *words = shlex.split(line)
            if tst != "tst" or "COMMAND" in words or all(map(str.isalpha, words)):
                continue  # not tst's, or only the name of a command
            running.run(words[0], words[1:])
            expected.append(words[0])
    assert understood == expected
    assert {*expected} == {*names}


def test_the_table_has_every_command():
    table = README.partition("| command |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert re.findall(r"`([a-z-]+)`", "".join(cells)) == list(chain(*COMMANDS.values()))


def test_paths_exist():
    for document in DOCUMENTS:
        text = document.read_text()
        names = re.findall(r"`((?:torchtitan|train_configs|scripts|tests|docs)/[\w./-]*)`", text)
        links = re.findall(r"\]\(((?!http)[^)]+)\)", text)
        assert names
        for name in names:
            assert (ROOT / name).exists(), f"{document.name}: {name}"
        for link in links:
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_reading_order_names_files_that_exist():
    section = README.partition("## Reading order")[2]
    for name in re.findall(r"`([\w/]+\.py)`", section):
        folders = (
            ROOT,
            PACKAGE,
            *(path for path in PACKAGE.rglob("*") if path.is_dir()),
        )
        assert any((folder / name).exists() for folder in folders), name


def test_the_table_has_the_configs_keys():
    pages = ("checkpoints", "data", "speed", "experts")
    checkpoints, data, speed, experts = ((ROOT / f"docs/{name}.md").read_text() for name in pages)
    documents = {
        "superposition": (README, Superposition),
        "resilience": (checkpoints, Resilience),
        "token_shards": (data, TokenShards),
        "text_dataset": (data, TextDataset),
        "lm_head": (speed, LMHead),
        "load_balance": (experts, LoadBalance),
    }
    for name, (text, section) in documents.items():
        table = text.partition(f"| key of `[{name}]`")[2].partition("\n\n")[0]
        keys = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
        assert keys == [f.name for f in fields(section)]


def config_of(toml, tmp_path):
    (tmp_path / "job.toml").write_text(toml)
    return SuperpositionConfigManager().parse_args([f"--job.config_file={tmp_path / 'job.toml'}"])


def test_options_of_jobs_exist():
    documents = [*DOCUMENTS, ROOT / "run_train.sh", *(ROOT / "scripts").rglob("*.py")]
    documents += (PACKAGE / "commands").glob("*.py")
    documents += [path for path in (ROOT / "scripts" / "slurm").iterdir() if path.is_file()]
    for document in documents:
        options = re.findall(r"--(?:no-)?([a-z_]+)\.([\w-]+)", document.read_text())
        for section, option in {*options} - {("section", "key"), ("job", "config")}:  # of any key
            keys = {f.name for f in fields(getattr(JobConfig(), section))}
            key = option.removeprefix("no-").replace("-", "_")
            assert key in keys, f"{document.name}: {section}.{option}"


def test_variables_of_the_batch_scripts_are_documented():
    table = (ROOT / "docs/slurm.md").read_text().partition("| variable |")[2].partition("\n\n")[0]
    documented = set(re.findall(r"`([A-Z_]+)`", table))
    scripts = [(ROOT / "scripts/slurm" / name).read_text() for name in ("train.sbatch", "chain.sh")]
    named = set(re.findall(r"^#   ([A-Z_]+) {2,}", "\n".join(scripts), re.MULTILINE))
    named -= {"NCCL_IB_HCA"}  # NCCL's own
    assert named == documented
    for name in documented:
        assert re.search(rf"\$\{{?{name}\b", "\n".join([*scripts, JOB_SH])), name


def test_the_toml_is_a_config(tmp_path):
    (toml,) = blocks("toml")
    assert build_schedule(config_of(toml, tmp_path)).enabled


def test_the_documents_of_data_are_true(tst, tmp_path):
    text = (ROOT / "docs/data.md").read_text()
    one, mixture = (
        config_of(toml, tmp_path) for toml in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    )
    assert one.training.dataset == mixture.training.dataset == "token_shards"
    assert mixture.token_shards.weights == [0.5, 0.5]
    table = text.partition("| `training.dataset` |")[2].partition("\n\n")[0]
    names = re.findall(
        r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines()[2:] if "|" in line)
    )
    assert {*names, "c4_test"} == set(DATASETS)
    options = succeeded(tst("tokenize", "--help"))
    for option in re.findall(r"--[\w-]+", text.partition("## Train")[0]):
        assert option in options


def test_the_python_runs():
    (code,) = blocks("python")

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
