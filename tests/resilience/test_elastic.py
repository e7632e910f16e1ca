"""Launches of several processes: other numbers of ranks, other layouts, faults of one rank."""

import json
import shutil
import signal

import pytest
import torch

from jobs import load_full, losses, saving, superposition
from torchtitan.experiments.tst.metrics_file import read_metrics
from torchtitan.experiments.tst.resilience import reporting
from torchtitan.experiments.tst.resilience.checkpoint import inventory
from torchtitan.experiments.tst.resilience.stop import STOPPED_EXIT_CODE

JOB = (
    *superposition(4, steps=4),
    "--training.steps=8",
    "--training.global_batch_size=8",
    "--training.local_batch_size=2",
    "--optimizer.eps=1e-3",  # as in test_distributed.py
    *saving(2),
)


def last_steps(checkpoints, *steps):
    """Leave these checkpoints only, as if the run had been killed after the last of them."""
    for step in inventory.complete_steps(checkpoints):
        if step not in steps:
            shutil.rmtree(checkpoints / f"step-{step}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {"folder": tmp_path_factory.mktemp("undisturbed") / "run"}


@pytest.fixture
def two_ranks(undisturbed, launch):
    """A run on two ranks from beginning to end: its folder."""
    folder = undisturbed["folder"]
    if not folder.exists():
        launch("recording_worker", *JOB, f"--job.dump_folder={folder}", processes=2)
    return folder


def read(folder):
    """Windows of each step on all ranks, and the metrics of each step."""
    windows = {}
    for path in sorted(folder.glob("windows-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            windows.setdefault(line["step"], []).extend(line["windows"])
    metrics = {line["step"]: line for line in read_metrics(folder)}
    return windows, metrics


def same_run(folder, reference):
    (windows, metrics), (expected_windows, expected) = read(folder), read(reference)
    for step in metrics:
        assert sorted(windows[step]) == sorted(expected_windows[step])
        assert metrics[step]["n_tokens_seen"] == expected[step]["n_tokens_seen"]
        for key, tolerance in [("loss_metrics/global_avg_loss", 1e-5), ("grad_norm", 5e-5)]:
            assert metrics[step][key] == pytest.approx(expected[step][key], rel=tolerance)
    return list(metrics)


def go_on(launch, source, folder, step, processes, *args):
    shutil.copytree(source / f"checkpoint/step-{step}", folder / f"checkpoint/step-{step}")
    launch("recording_worker", *JOB, f"--job.dump_folder={folder}", *args, processes=processes)


def test_two_ranks_then_four_then_one_across_the_boundary(two_ranks, launch, tmp_path):
    four, one = tmp_path / "four", tmp_path / "one"
    go_on(launch, two_ranks, four, 2, 4)
    assert same_run(four, two_ranks) == [3, 4, 5, 6, 7, 8]
    go_on(launch, four, one, 6, 1)
    assert same_run(one, two_ranks) == [7, 8]
    # and what the ranks of the last launch leave is again what two ranks would have
    found, expected = (load_full(run / "checkpoint/step-8") for run in (one, two_ranks))
    assert found.keys() == expected.keys()
    assert all(found[key].allclose(expected[key], atol=1e-6) for key in found)


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        pytest.param(2, ("--parallelism.tensor_parallel_degree=2",), marks=pytest.mark.slow),
        (4, ("--parallelism.data_parallel_replicate_degree=2",)),
    ],
    ids=["tensor parallel", "HSDP"],
)
def test_another_layout_in_superposition(two_ranks, launch, tmp_path, processes, layout):
    go_on(launch, two_ranks, tmp_path / "run", 2, processes, *layout)
    assert same_run(tmp_path / "run", two_ranks) == [3, 4, 5, 6, 7, 8]


def test_a_rank_whose_loss_is_not_finite_holds_all_back(launch, tmp_path):
    job = (*JOB, f"--job.dump_folder={tmp_path}", "--checkpoint.interval=1")
    job += ("--resilience.max_skipped_steps=1", "--poison=3,5")
    result = launch("recording_worker", *job, processes=2, check=False)
    assert result.failed
    assert result.output.count("training stopped: step 5 (recovery phase): ") == 1
    assert all(f"rank {rank} ended with {reporting.EXIT_CODE}" in result.output for rank in (0, 1))
    assert "loss not finite on ranks [1]" in result.output
    folder = tmp_path / "checkpoint"
    assert inventory.complete_steps(folder) == [1, 2, 3, 4]
    two, three, four = (load_full(folder / f"step-{step}") for step in (2, 3, 4))
    assert all(torch.equal(two[key], three[key]) for key in two)
    assert not any(torch.equal(three[key], four[key]) for key in three)


def test_a_damage_that_one_rank_finds_stops_all(two_ranks, launch, tmp_path):
    source = two_ranks / "checkpoint"
    shutil.copytree(source / "step-6", tmp_path / "checkpoint/step-6")
    path = tmp_path / "checkpoint/step-6/__1_0.distcp"  # only one rank looks at it
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    job = (*JOB, f"--job.dump_folder={tmp_path}")
    result = launch("recording_worker", *job, processes=2, check=False)
    assert result.failed
    assert all(f"rank {rank} ended with {reporting.EXIT_CODE}" in result.output for rank in (0, 1))
    _, *messages = result.output.split("checkpoint error: ")
    assert len(messages) == 1
    assert "step-6/__1_0.distcp: its checksum does not match" in messages[0][:500]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_one_rank_is_killed_or_asked_to_stop(two_ranks, launch, tmp_path, number):
    """And launched again, the run is the undisturbed one, bit for bit."""
    job = (*JOB, f"--job.dump_folder={tmp_path}")
    signalled = f"--signal=5,{int(number)}"
    result = launch("recording_worker", *job, signalled, processes=2, check=False)
    assert result.failed
    last = inventory.complete_steps(tmp_path / "checkpoint")[-1]
    if number == signal.SIGKILL:
        assert last == 4
    else:
        assert last in (5, 6)
        assert f"Stopped after step {last} " in result.output
        for rank in (0, 1):
            assert f"rank {rank} ended with {STOPPED_EXIT_CODE}" in result.output
    launch("recording_worker", *job, processes=2)
    found, expected = (losses(read_metrics(run)) for run in (tmp_path, two_ranks))
    assert found == expected
    found, expected = (load_full(run / "checkpoint/step-8") for run in (tmp_path, two_ranks))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.slow
def test_short_fault_injection(corpus, tmp_path, capsys):
    """A kill and a stop; ``scripts/inject_faults.py`` does as many as are wanted."""
    import inject_faults

    options = f"--kills=1 --stops=1 --steps=24 --seed=3 --corpus={corpus} --folder={tmp_path}"
    inject_faults.main(options.split())
    assert "bit for bit" in capsys.readouterr().out
