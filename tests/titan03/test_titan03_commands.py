"""The command tst where TorchTitan 0.3 is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan.experiments.tst.data.demo_corpus import tokenize_corpus
from torchtitan.experiments.tst.data.errors import DataError
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.titan03 import start

ROOT = Path(__file__).parents[2]
NUMBERS = json.loads(Path(__file__).with_name("numbers.json").read_text())  # of TorchTitan 0.2.2
WITHOUT = {path for path in NUMBERS if "reinit" in path}  # with a key that has no counterpart


def tst(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torchtitan.experiments.tst", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def check(path: str, *arguments: str, reinit: bool = True) -> list[str]:
    job = start.read([f"--job.config_file={ROOT / path}", *arguments])
    if not reinit:
        job.superposition.reinit_at_recovery = []
    ranks = int(NUMBERS[path][0].split()[-2].replace(",", ""))
    return start.check(job, ranks, machine=False, files=False)


@pytest.mark.parametrize("path", sorted(set(NUMBERS) - WITHOUT))
def test_a_job_has_the_numbers_of_022(path):
    assert check(path) == NUMBERS[path]


@pytest.mark.parametrize("path", sorted(WITHOUT))
def test_a_config_with_a_key_that_has_no_counterpart(path):
    with pytest.raises(ConfigError, match=r"superposition\.reinit_at_recovery.*no counterpart"):
        check(path)
    assert check(path, reinit=False) == NUMBERS[path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--training.seq_len=63", "--parallelism.tensor_parallel_degree=2"],
            "gives sequences of 63",
        ),
        (["--validation.seq_len=128"], "validation.seq_len = 128: must be at most training.seq"),
        (["--training.global_batch_size=3"], "must be a multiple of 4"),
        (["--training.dataloader.num_workers=2"], "must be 0 or 1 with superposition"),
        (["--token_shards.paths=a"], "token_shards.paths = ['a']: needs training.dataset"),
        (["--superposition.steps=20"], "must be fewer than training.steps = 20"),
        (["--parallelism.data_parallel_shard_degree=3"], "needs 3 ranks"),
    ],
)
def test_a_job_that_cannot_run(arguments, message):
    ranks = 2 if "--parallelism.tensor_parallel_degree=2" in arguments else 1
    job = start.read([f"--job.config_file={ROOT}/train_configs/debug/llama3.toml", *arguments])
    with pytest.raises(ConfigError) as error:
        start.check(job, ranks, files=False)
    assert message in str(error.value)


def test_the_command_prints_the_numbers():
    path = "train_configs/debug/qwen3_moe.toml"
    result = tst("check", path, "--ranks=1", "--no-files", "--engine=0.3")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "\n  ".join([f"{path}: all checks passed", *NUMBERS[path]]) + "\n"
    assert result.stderr.startswith("training.dataset = 'jsonl': TorchTitan 0.3 keeps the docum")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["plan", "job.toml"],
            "error: tst plan needs TorchTitan 0.2.2, but 0.3.0 is installed; with it, tst has "
            "configs, check, train, core, conformance\n",
        ),
        (
            ["check", "train_configs/debug/llama3.toml", "--engine=0.2"],
            "error: --engine 0.2: TorchTitan 0.3.0 is installed; use an environment with "
            "torchtitan==0.2.2, or remove this option\n",
        ),
    ],
)
def test_what_needs_022_says_so_in_one_line(arguments, message):
    result = tst(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


def test_the_demos_token_shards_are_not_made(tmp_path):
    """They are tokenized by code for TorchTitan 0.2.2; the error says so."""
    with pytest.raises(DataError, match="tokens is missing, and token shards are made with"):
        tokenize_corpus(tmp_path)
