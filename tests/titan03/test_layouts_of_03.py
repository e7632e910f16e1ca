"""Layouts of several ranks on TorchTitan 0.3 train as one rank does, across the boundary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("layout_worker.py")
LLAMA3, QWEN3_MOE = ("llama3", "demo"), ("qwen3", "demo_moe")
NEW_TORCH = torch.__version__ >= "2.14"


def launch(folder: Path, ranks: int, corpus: Path, **options) -> Path:
    """Train a job on so many ranks; returns its folder."""
    options = {"corpus": str(corpus), "layout": {}, "chunks": 1} | options
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--standalone", str(WORKER), str(folder), json.dumps(options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{WORKER.parent}:{WORKER.parent.parent}"
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory, corpus):
    """The first weights, and losses and norms of one rank, by model."""
    found: dict[tuple[str, str], tuple[str, list]] = {}

    def of(model):
        if model not in found:
            folder = tmp_path_factory.mktemp(model[1])
            launch(folder / "seed", 1, corpus, model=model, seed=True)
            weights = str(folder / "seed/checkpoint/step-0")
            launch(folder / "one", 1, corpus, model=model, weights=weights)
            found[model] = weights, json.loads((folder / "one/losses.json").read_text())
        return found[model]

    return of


slow = pytest.mark.slow
LAYOUTS = [
    pytest.param(LLAMA3, {"tensor_parallel_degree": 2}, 4, id="TP, a loss in chunks"),
    pytest.param(LLAMA3, {}, 1, id="FSDP", marks=slow),
    pytest.param(LLAMA3, {"tensor_parallel_degree": 2}, 1, id="TP", marks=slow),
    pytest.param(
        LLAMA3,
        {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1},
        1,
        id="HSDP",
        marks=slow,
    ),
    pytest.param(
        LLAMA3,
        {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2},
        1,
        id="PP",
        marks=[slow, pytest.mark.skipif(not NEW_TORCH, reason="needs torch 2.14")],
    ),
    pytest.param(QWEN3_MOE, {}, 1, id="FSDP, experts", marks=slow),
    pytest.param(
        QWEN3_MOE,
        {"expert_parallel_degree": 2},
        1,
        id="EP",
        marks=[slow, pytest.mark.skipif(NEW_TORCH, reason="gloo of torch 2.14 refuses EP")],
    ),
]


@pytest.mark.parametrize(("model", "layout", "chunks"), LAYOUTS)
def test_two_ranks_train_as_one(model, layout, chunks, of_one_rank, corpus, tmp_path):
    weights, (losses, norms) = of_one_rank(model)
    launch(tmp_path, 2, corpus, model=model, weights=weights, layout=layout, chunks=chunks)
    found_losses, found_norms = json.loads((tmp_path / "losses.json").read_text())
    assert found_losses == pytest.approx(losses, rel=1e-6)
    assert found_norms == pytest.approx(norms, rel=1e-5)
