"""The benchmarks of scripts/benchmark run, at a small size."""

import json
import shlex

import pytest
import torch

import launches


@pytest.fixture
def script(run_script):
    """Run the command line of a script in this process."""

    def run(line: str, *args: object) -> str:
        python, path, *words = shlex.split(line)
        assert python.endswith("python")
        name = path.removeprefix("scripts/").removesuffix(".py")
        result = run_script(name, *words, *args)
        assert result.code == 0, result.stderr
        return result.stdout

    return run


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
