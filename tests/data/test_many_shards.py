"""Trillions of tokens in 100,000 shards: what a launch opens and keeps, and positions beyond 2^40.

The whole number of shards: scripts/test.sh -m slow tests/data/test_many_shards.py
"""

import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from benchmark.many_shards import write_sparse_shards
from jobs import ROOT, TST, saving, superposition
from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.data.errors import DataError
from torchtitan.experiments.tst.data.shards import once
from torchtitan.experiments.tst.data.shards.loader import ShardsDataloader
from torchtitan.experiments.tst.data.shards.mixture import Position
from torchtitan.experiments.tst.data.shards.once import once_in_launch
from torchtitan.experiments.tst.data.shards.token_shards import TokenShards
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.resilience.checkpoint.manifests import (
    MANIFEST,
    read_manifest,
    write_manifest,
)
from torchtitan.experiments.tst.testing import ranks

RANKS = 4
CHECKED = {".index", ".metadata"}


def shards_job(folder, *args):
    return (
        "--training.dataset=token_shards",
        f"--training.dataset_path={folder}",
        f"--training.global_batch_size={RANKS}",
        "--training.local_batch_size=1",
        *args,
    )


def run_on_ranks(function, tmp_path, *args, processes=RANKS):
    """What each rank's function returned."""
    folder = tmp_path / "ranks"
    log = ranks.run_ranks(_write_result, processes, folder, folder, function, *args)
    assert log is None, log
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def _write_result(folder, function, *args):
    rank = int(os.environ["RANK"])
    (folder / f"{rank}.json").write_text(json.dumps(function(rank, *args)))


# What a launch opens


def start(rank, args, folder):
    """What a rank's trainer does with the shards before its first step, and the error if any."""
    opened, began = [], time.perf_counter()

    def count(event, arguments):
        if event == "open" and str(arguments[0]).startswith(f"{folder}/"):
            opened.append(str(arguments[0]))

    sys.addaudithook(count)
    config = SuperpositionConfigManager().parse_args(args)
    try:
        check_job(config)
    except ConfigError as error:
        return {"error": str(error), "opened": len(opened)}
    tokenizer = HuggingFaceTokenizer(config.model.hf_assets_path)
    loader = ShardsDataloader(RANKS, rank, tokenizer, config)
    loader.mixture.sources[0].checksum()  # for the checkpoint
    _, labels = next(iter(loader))
    return {
        "checked": sum(Path(path).suffix in CHECKED for path in opened),
        "opened": len(opened),
        "tokens": loader.mixture.sources[0].tokens,
        "labels": labels.sum().item(),
        "seconds": time.perf_counter() - began,
    }


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_one_rank_checks_the_shards_for_all(tmp_path, base_args, count):
    """Each file once in a launch, and ids of a sample where the tokenizer is not known."""
    folder = write_sparse_shards(tmp_path / "shards", count, 100_000)
    first, *others = run_on_ranks(start, tmp_path, [*base_args, *shards_job(folder)], str(folder))
    print(first, others)
    assert first["checked"] == 2 * count
    assert first["opened"] <= 2 * count + 300
    for rank in others:
        assert rank["checked"] == 0
        assert rank["opened"] <= 4
    assert {rank["tokens"] for rank in (first, *others)} == {100_000 * count}


def test_a_damaged_shard_is_the_same_error_on_all_ranks(tmp_path, base_args):
    folder = write_sparse_shards(tmp_path / "shards", 50, 100_000)
    with (folder / "000049_merged.ds").open("r+b") as file:
        file.truncate(399_996)
    found = run_on_ranks(start, tmp_path, [*base_args, *shards_job(folder)], str(folder))
    errors = {rank["error"] for rank in found}
    assert len(errors) == 1
    assert "000049_merged.ds is truncated: it has 99,999 tokens" in errors.pop()
    assert [bool(rank["opened"]) for rank in found] == [True, False, False, False]


def test_a_launch_with_a_damaged_shard_says_so_once(tmp_path, launch):
    folder = write_sparse_shards(tmp_path / "shards", 3, 100_000)
    (folder / "000001_merged.ds.index").unlink()
    found = launch(TST, *shards_job(folder), processes=2, check=False)
    assert found.failed
    said = f"config error: training.dataset_path = '{folder}': {folder}/000001_merged.ds.index is "
    assert found.output.count(said) == 1
    assert "Traceback" not in found.output


LARGE = 3 * 2**23  # bytes, which the store takes in parts


def without_torchrun(port):
    """Rank 0 has the store."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}


def share(rank, port):
    """Two results and an error of rank 0, each asked for in another order."""
    calls = []
    if port:
        without_torchrun(port)

    def make(what):
        calls.append(what)
        if what == "error":
            raise OSError(5, "no such luck")
        return what, bytes(LARGE)

    def ask(what):
        try:
            result, content = once_in_launch(what, lambda: make(what))
            return result, len(content)
        except OSError as error:
            return str(error)

    order = ["a", "b", "error"] if rank else ["error", "b", "a"]
    answers = {what: ask(what) for what in [*order, "a"]}
    dist.init_process_group("gloo")  # which meets at the same store
    dist.barrier()
    dist.destroy_process_group()
    return [calls, answers["a"], answers["b"], answers["error"]]


@pytest.mark.parametrize("torchrun", [True, False])
def test_a_result_of_rank_0_is_shared(tmp_path, torchrun):
    found = run_on_ranks(share, tmp_path, 0 if torchrun else ranks.free_port())
    for rank, (calls, *answers) in enumerate(found):
        assert calls == ([] if rank else ["error", "b", "a"])
        assert answers == [["a", LARGE], ["b", LARGE], "[Errno 5] no such luck"]


def end_too_early(rank, port):
    without_torchrun(port)
    once_in_launch("met", lambda: None)
    if rank == 0:
        once._store().get("taken")
    else:
        once._store().set("taken", "")
        with pytest.raises(DataError, match="rank 0 has ended"):
            once_in_launch("never", lambda: None)


def test_nobody_waits_for_a_rank_0_that_is_gone(tmp_path):
    run_on_ranks(end_too_early, tmp_path, ranks.free_port(), processes=2)


def test_a_rank_alone_of_others_that_are_not_there_does_not_wait(
    tmp_path, make_config, one_process
):
    """With comm.mode = "fake_backend", which the environment of a launch does not tell."""
    os.environ |= {"WORLD_SIZE": "64", "RANK": "1"}
    config = make_config(*shards_job(write_sparse_shards(tmp_path / "shards", 1, 10**6)))
    config.comm.mode = "fake_backend"
    assert ShardsDataloader(64, 1, None, config).mixture.sources[0].tokens == 10**6


# What a process keeps


@pytest.mark.parametrize("corpus_file", [False, True])
def test_shards_are_kept_in_little_memory(tmp_path, corpus_file):
    source = TokenShards(write_sparse_shards(tmp_path, 2000, 1000, corpus_file=corpus_file))
    assert len(pickle.dumps(source)) < 32 * 2000


# Positions


TRILLION_SHARDS, SHARD_TOKENS = 5, 2**38


@pytest.fixture
def trillion(tmp_path):
    """Zeros; the token before each of these positions is 1, and 2, 3, ... follow."""
    folder = write_sparse_shards(tmp_path / "trillion", TRILLION_SHARDS, SHARD_TOKENS)
    for place in PLACES:
        for number in range(TRILLION_SHARDS):
            first = number * SHARD_TOKENS
            begin, end = max(place - 1, first), min(place + 2000, first + SHARD_TOKENS)
            if begin < end:
                with (folder / f"{number:06d}_merged.ds").open("r+b") as file:
                    file.seek(4 * (begin - first))
                    marks = np.arange(begin, end) - place + 2
                    file.write((marks % 1000).astype("<u4").tobytes())
    return folder


PLACES = [2**31, 2**32, SHARD_TOKENS - 700, 2**40 - 700]


@pytest.mark.parametrize("epochs", [0, 3])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("workers", [0, 1])
def test_positions_beyond_2_to_the_40(trillion, make_config, place, epochs, workers):
    """Read, saved and resumed, with the tokens that are there."""
    config = make_config(
        *shards_job(trillion, f"--training.dataloader.num_workers={workers}"),
        *superposition(4, 3),
    )
    begin = epochs * TRILLION_SHARDS * SHARD_TOKENS + place - 1
    loader = ShardsDataloader(1, 0, None, config)
    loader.load_state_dict({"token_position": Position((begin,), (0.0,)).to_json()})
    loader.begin(0)
    read, states = [], []
    for inputs, _ in itertools.islice(loader, 5 * RANKS):
        read += inputs["input"].flatten().tolist()
        states.append(pickle.loads(pickle.dumps(loader.state_dict())))
    windows = [129] * 3 * RANKS + [33] * 2 * RANKS  # of stages and of recovery
    starts = np.cumsum([0, *windows[:-1]])
    expected = [np.arange(s, s + n - 1) for s, n in zip(starts, windows, strict=True)]
    assert read == ((np.concatenate(expected) + 1) % 1000).tolist()
    assert loader.position.tokens == (begin + sum(windows),)

    resumed = ShardsDataloader(1, 0, None, config)
    resumed.load_state_dict(states[2 * RANKS - 1])
    resumed.begin(2)
    again = [inputs["input"] for inputs, _ in itertools.islice(resumed, 3 * RANKS)]
    assert torch.cat([batch.flatten() for batch in again]).tolist() == read[2 * RANKS * 128 :]
    assert resumed.position == loader.position


def test_a_run_counts_tokens_beyond_2_to_the_40(train, tmp_path):
    """In metrics and checkpoints, on from a checkpoint that says so."""
    args = (*superposition(4, 1), *saving(2))
    train(*args, "--training.steps=2")
    checkpoint = tmp_path / "run" / "checkpoint" / "step-2"
    manifest = read_manifest(checkpoint)
    files = manifest.pop("files")
    already = 2**41 + 1
    write_manifest(checkpoint, manifest | {"data_tokens": already}, files)
    lines = [line for line in train(*args, "--training.steps=4") if line["step"] > 2]
    read = [already + 4 * 32, already + 2 * 4 * 32]
    assert [line["n_tokens_seen"] for line in lines] == read
    saved = json.loads((tmp_path / "run" / "checkpoint" / "step-4" / MANIFEST).read_text())
    assert saved["data_tokens"] == read[-1]


def test_the_benchmark_runs():
    script = ROOT / "scripts" / "benchmark" / "many_shards.py"
    few = ["--shards=40", "--ranks=2", "--rounds=1", "--seconds=0.1"]
    result = subprocess.run([sys.executable, script, *few], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "rank 0: 80 files opened" in result.stdout
    assert "the others: 0 files opened" in result.stdout
    assert result.stdout.count("data tokens/s (median of 1)") == 2


@pytest.mark.parametrize(
    "other", [{"LOCAL_RANK": None}, {"TORCHELASTIC_MAX_RESTARTS": "2"}, {"WORLD_SIZE": "1"}]
)
def test_a_process_that_shares_no_new_store_does_the_work_itself(monkeypatch, other):
    """On one of a cluster's nodes, and where torchrun restarts ranks with the same store."""
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in (rank | {"MASTER_PORT": "1"} | other).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(
            name, value
        )
    assert once_in_launch("alone", lambda: 7) == 7


def test_an_error_that_cannot_be_pickled_is_still_said():
    error = ConfigError("training.steps", 0, "must be at least 1")
    assert "training.steps" in str(once._picklable(error))
    assert isinstance(once._picklable(error), DataError)
