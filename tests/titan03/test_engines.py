"""From the same weights and tokens, the losses on TorchTitan 0.3 are those on 0.2.2."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from jobs_of_03 import train
from jobs_of_both import BOUNDARY, MODELS, STEPS, S, args

from torchtitan.experiments.tst.metrics_file import TRAINING_LOSS, read_metrics
from torchtitan.experiments.tst.titan03.job import to_config
from torchtitan.experiments.tst.titan03.job_config import read

ROOT = Path(__file__).parents[2]
RUNS = [(model, processes) for model in MODELS for processes in (1, 2)]
SLOW = [("llama3", 2)]


@pytest.fixture(scope="session")
def references(corpus, on_02) -> Path:
    """The runs of TorchTitan 0.2.2, once for all processes of a run of pytest."""
    folder = corpus.with_name("engines")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = folder.with_name("engines-making")
            on_02("reference_run.py", corpus, making, *(word for run in RUNS for word in run))
            making.rename(folder)
    return folder


def on_03(arguments: list[str], processes: int, folder: Path) -> list[dict[str, Any]]:
    """Train a job with TorchTitan 0.3; returns the lines of metrics.jsonl."""
    arguments = [*arguments, f"--job.dump_folder={folder}"]
    if processes == 1:
        train(to_config(read(arguments)))
        return read_metrics(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "torchtitan.experiments.tst.titan03.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return read_metrics(folder)


@pytest.mark.parametrize(
    ("model", "processes"),
    [pytest.param(*run, marks=[pytest.mark.slow] * (run in SLOW)) for run in RUNS],
)
def test_losses_are_those_of_022(model, processes, references, corpus, tmp_path):
    """20 steps in float32, across the boundary."""
    arguments = args(corpus, model, references / f"weights-{model}", processes)
    expected = read_metrics(references / f"{model}-{processes}")
    found = on_03(arguments, processes, tmp_path)
    for line in (*expected, *found):
        assert line["bag_size"] == (S if line["step"] <= BOUNDARY else 1)
    assert len(found) == STEPS
    for key in (TRAINING_LOSS, "grad_norm"):
        values = [line[key] for line in expected]
        assert [line[key] for line in found] == pytest.approx(values, rel=1e-5, abs=1e-5), key
    for key in ("step", "phase", "n_tokens_seen", "n_latents_seen"):
        assert [line[key] for line in found] == [line[key] for line in expected], key
    assert [line["lr/AdamW"] for line in found] == [line["lr"] for line in expected]
