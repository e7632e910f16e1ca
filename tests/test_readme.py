"""The README is true: its paths exist, its commands run, its table is the config's."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn
from torchtitan.hf_datasets.text_datasets import DATASETS

import launches
from jobs import ON, ROOT, SAVE, column
from torchtitan.experiments.tst.job_config import (
    JobConfig,
    LMHead,
    Resilience,
    Superposition,
    SuperpositionConfigManager,
    TextDataset,
    TokenShards,
    build_schedule,
)
from torchtitan.experiments.tst.metrics import read_metrics

README = (ROOT / "README.md").read_text()
JOB_SH = (ROOT / "scripts" / "job.sh").read_text()
SHORT = ["--training.steps=12", "--validation.freq=6", "--validation.steps=1"]
SHORT += ["--metrics.log_freq=2"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [
        line.partition(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()
    ]
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    inline = re.findall(r"`((?:python|scripts/|\./)[^`\n]* [^`\n]*|scripts/[\w./]+\.sh)`", prose)
    return sorted({*lines, *inline})


PYTHON = f"""#!/usr/bin/env bash
# Stands for python: writes down launches and what follows them, and does the rest.
if [[ $2 == torchtitan.experiments.tst.* || $1 == scripts/compare_runs.py ]]; then
    printf '%s\\t' "${{WORLD_SIZE:-}}" "$@" >> "$RECORD"
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


@pytest.fixture
def launched(shell, run_script, tmp_path):
    """As ``shell``, but what it launches is forked, and scripts run in this process."""

    def run(line: str, *args: str) -> tuple[Path, str]:
        python, record = tmp_path / "bin" / "python", tmp_path / "record"
        python.parent.mkdir()
        python.write_text(PYTHON)
        python.chmod(0o755)
        path = f"{python.parent}:{os.environ['PATH']}"
        folder, output = shell(line, *args, PATH=path, RECORD=str(record)), ""
        for words in record.read_text().splitlines():
            played_ranks, first, *rest = words.rstrip("\t").split("\t")
            if first == "-m":
                processes = re.findall(r"--nproc_per_node=(\d+)", words) or [1]
                module, *arguments = rest[rest.index("-m") + 1 :] if "-m" in rest else rest
                environment = {"NGPU": played_ranks, "WORLD_SIZE": played_ranks}
                forked = launches.fork(
                    *(module, arguments, int(processes[0]), tmp_path / "logs"),
                    **(environment if played_ranks else {}),
                )
                output += launches.succeeded(forked).output
            else:
                result = run_script(Path(first).stem, *rest)
                assert result.code == 0, result.stderr
        return folder, output

    return run


@pytest.fixture
def script(run_script):
    """Run the command line of a script in this process."""

    def run(line: str, *args: object) -> str:
        python, path, *words = shlex.split(line)
        assert python.endswith("python")
        result = run_script(path.removeprefix("scripts/").removesuffix(".py"), *words, *args)
        assert result.code == 0, result.stderr
        return result.stdout

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


def test_debug(launched):
    run, _ = launched(
        "CONFIG_FILE=train_configs/debug/qwen3_moe.toml NGPU=4 ./run_train.sh "
        "--superposition.bag_size 8",
        *("--superposition.steps=2", "--training.steps=4", "--validation.freq=2"),
    )
    assert set(column(read_metrics(run), "bag_size")) == {1, 8}


def test_help(launched):
    assert "--superposition.bag-size" in launched("NGPU=1 ./run_train.sh --help")[1]


def test_dry_run(launched):
    run, output = launched(
        "COMM_MODE=fake_backend NGPU=64 CONFIG_FILE=train_configs/debug/llama3.toml ./run_train.sh"
    )
    assert "dp_shard=64" in output
    assert not run.exists()  # leaves the run's folder alone


def test_compare(script, finished, tmp_path):
    runs = finished(*ON, *SAVE).folder, finished().folder
    output = tmp_path / "comparison"
    script("python scripts/compare_runs.py", *runs, "--output", output)
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
    "line",
    [
        "python scripts/diff_configs.py train_configs/paper/3B-20k-baseline.toml "
        "train_configs/paper/3B-20k-tst.toml",
        "python scripts/plan.py --job.config_file train_configs/demo/tst.toml",
        "python scripts/dry_run.py train_configs/demo/tst.toml",
    ],
)
def test_scripts(script, line):
    assert script(line)


def test_command_for_tests(shell):
    shell("scripts/test.sh --version")


# What stands in the README, and what tries it
TRIED = {
    "./run_train.sh": test_demo,
    "CONFIG_FILE=train_configs/demo/baseline.toml ./run_train.sh": test_baseline,
    ".venv/bin/python scripts/compare_runs.py outputs/demo/tst outputs/demo/baseline "
    "--output outputs/demo/comparison": test_compare,
    "./run_train.sh --help": test_help,
    "CONFIG_FILE=train_configs/debug/qwen3_moe.toml NGPU=4 ./run_train.sh "
    "--superposition.bag_size 8": test_debug,
    "COMM_MODE=fake_backend NGPU=64 CONFIG_FILE=train_configs/debug/llama3.toml "
    "./run_train.sh": test_dry_run,
    "python scripts/benchmark/step.py --job.config_file train_configs/demo/tst.toml": (
        test_benchmark_of_a_step
    ),
    "python scripts/benchmark/loss.py": test_benchmark_of_the_loss,
    "python scripts/benchmark/data.py": test_benchmark_of_data,
    "python scripts/diff_configs.py train_configs/paper/3B-20k-baseline.toml "
    "train_configs/paper/3B-20k-tst.toml": test_scripts,
    "python scripts/plan.py --job.config_file JOB.toml": test_scripts,
    "python scripts/dry_run.py JOB.toml": test_scripts,
    "scripts/test.sh": test_command_for_tests,
    "pip install .": "test_packaging.py",
    "torchrun --nproc_per_node=8 -m torchtitan.experiments.tst.train "
    "--job.config_file job.toml": "test_parity.py",
    "python -m torchtitan.experiments.tst.device torchtitan.train": "test_parity.py",
    "python -m torchtitan.train": "upstream's",
    "python scripts/tokenize_corpus.py SOURCE FOLDER "
    "--tokenizer assets/hf/Llama-3.1-8B": "data/test_tokenization.py",
    "CONFIG_FILE=train_configs/paper/3B-20k-tst.toml sbatch --nodes=8 --gpus-per-node=8 "
    "--exclusive scripts/slurm/train.sbatch": "test_batch_scripts.py",
    "python scripts/export_model.py outputs/demo/tst outputs/demo/hf": "test_export.py",
    "python scripts/evaluate_model.py outputs/demo/hf": "test_export.py",
    'python scripts/sample_model.py outputs/demo/tst --prompt "def main("': "test_export.py",
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
    assert commands() == sorted(TRIED)


def test_paths_exist():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for document in documents:
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
    package = ROOT / "torchtitan/experiments/tst"
    for name in re.findall(r"`([\w/]+\.py)`", section):
        folders = (
            ROOT,
            package,
            *(
                package / name
                for name in ("core", "checkpoint", "config", "data", "planning", "results")
            ),
        )
        assert any((folder / name).exists() for folder in folders), name


def test_the_table_has_the_configs_keys():
    checkpoints, data, speed = (
        (ROOT / f"docs/{name}.md").read_text() for name in ("checkpoints", "data", "speed")
    )
    documents = {
        "superposition": (README, Superposition),
        "resilience": (checkpoints, Resilience),
        "token_shards": (data, TokenShards),
        "text_dataset": (data, TextDataset),
        "lm_head": (speed, LMHead),
    }
    for name, (text, section) in documents.items():
        table = text.partition(f"| key of `[{name}]`")[2].partition("\n\n")[0]
        keys = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
        assert keys == [f.name for f in fields(section)]


def config_of(toml, tmp_path):
    (tmp_path / "job.toml").write_text(toml)
    return SuperpositionConfigManager().parse_args([f"--job.config_file={tmp_path / 'job.toml'}"])


def test_options_of_jobs_exist():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    documents += [ROOT / "run_train.sh", *(ROOT / "scripts").rglob("*.py")]
    documents += [path for path in (ROOT / "scripts" / "slurm").iterdir() if path.is_file()]
    for document in documents:
        options = re.findall(r"--(?:no-)?([a-z_]+)\.([\w-]+)", document.read_text())
        for section, option in options:
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


def test_the_documents_of_data_are_true(tmp_path):
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
    options = launches.fork("scripts/tokenize_corpus.py", ["--help"], 1, tmp_path / "help").output
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
