"""The batch scripts with stand-ins for Slurm's commands; with a real Slurm in test_slurm.py."""

import os
import signal
import subprocess
import sys

import pytest

from jobs import ROOT

STAND_INS = {
    "python": f"""
        if [[ $2 == torchtitan.experiments.tst.launch ]]; then
            echo "node $SLURM_NODEID: $*" >> "$RECORD"
            exit "$EXIT_CODE"
        fi
        exec {sys.executable} "$@"
    """,
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for SLURM_NODEID in 0 1; do
            export SLURM_NODEID
            "$@" || code=$?
        done
        exit "${code:-0}"
    """,
    "squeue": 'echo "$STATE"',
    # Slurm ends the job that it queues again
    "scontrol": 'echo "scontrol $*" >> "$RECORD"; kill -KILL $PPID',
    "scancel": 'echo "scancel $*" >> "$RECORD"',
    "sbatch": """
        echo "sbatch $*" >> "$RECORD"
        [[ $* != *nowhere* ]] || exit 1
        grep -c sbatch "$RECORD"
    """,
}


@pytest.fixture
def script(tmp_path):
    """Run a batch script as the first node of job 7 on two; gives its result and what it called."""
    tools, record = tmp_path / "bin", tmp_path / "record"
    tools.mkdir()
    for name, content in STAND_INS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{content}")
        (tools / name).chmod(0o755)
    (tmp_path / "job.toml").touch()

    def run(name, *args, **variables):
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        settings = {"CONFIG_FILE": str(tmp_path / "job.toml"), "NGPU": "4", "EXIT_CODE": "0"}
        path = {"PATH": f"{tools}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
        others = {"RECORD": str(record), "STATE": "RUNNING"}
        record.write_text("")
        result = subprocess.run(
            ["bash", f"scripts/slurm/{name}", *args],
            cwd=ROOT,
            env=os.environ | job | settings | path | others | variables,
            capture_output=True,
            text=True,
        )
        return result, record.read_text().splitlines()

    return run


def test_both_nodes_start_the_job(script, tmp_path):
    result, calls = script("train.sbatch", "--training.steps=5", SLURM_RESTART_COUNT="2")
    assert result.returncode == 0
    assert [call.partition(":")[0] for call in calls] == ["node 0", "node 1"]
    for call, shown in zip(calls, ("0", "-1"), strict=True):
        for option in (
            "--nnodes=2 --nproc_per_node=4 --rdzv_id=7.2 ",
            f"--local-ranks-filter={shown} ",
            f"-m torchtitan.experiments.tst.train --job.config_file {tmp_path}/job.toml "
            "--training.steps=5",
        ):
            assert option in call


@pytest.mark.parametrize(
    ("task", "queued"),
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, "5_3")],
    ids=["job", "task of an array"],
)
def test_a_job_that_has_stopped_is_queued_again(script, tmp_path, task, queued):
    if task:  # the configs of a sweep
        (tmp_path / "3.toml").touch()
        task = task | {"CONFIG_FILE": str(tmp_path)}
    result, calls = script("train.sbatch", EXIT_CODE="75", **task)
    assert result.returncode == -signal.SIGKILL
    assert calls[2:] == [f"scontrol requeue {queued}"]
    assert ("/3.toml" in calls[0]) == bool(task)


@pytest.mark.parametrize(("code", "state"), [(75, "CANCELLED"), (75, ""), (3, "RUNNING")])
def test_a_job_that_is_not_to_go_on_is_not_queued_again(script, code, state):
    result, calls = script("train.sbatch", EXIT_CODE=str(code), STATE=state)
    assert result.returncode == code
    assert len(calls) == 2


def test_a_chain_is_two_jobs(script):
    both = {"SBATCH_OPTIONS": "--nodes=2", "RECOVERY_ARGS": "--training.steps=9"}
    result, (first, second) = script("chain.sh", "--optimizer.lr=1", **both)
    assert result.returncode == 0
    train = "scripts/slurm/train.sbatch"
    assert first.endswith(f"{train} --superposition.stop_at_boundary --optimizer.lr=1")
    assert second.endswith(f"{train} --optimizer.lr=1 --training.steps=9")
    assert "--dependency=afterok:1 " in second
    assert all("--parsable --nodes=2 " in call for call in (first, second))


def test_a_chain_is_submitted_whole_or_not_at_all(script):
    result, calls = script("chain.sh", RECOVERY_OPTIONS="--partition=nowhere")
    assert result.returncode == 1
    assert calls[2:] == ["scancel 1"]


def test_a_job_needs_its_config(script):
    result, calls = script("train.sbatch", CONFIG_FILE="")
    assert result.returncode == 2
    assert "CONFIG_FILE is not set" in result.stderr
    assert not calls
