"""The batch script of an evaluation with stand-ins for Slurm, and its installation."""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import slurm_stand_ins
from jobs import ROOT
from slurm_stand_ins import SLURM
from torchtitan.experiments.tst.commands import evaluate
from torchtitan.experiments.tst.commands.harness_options import HarnessOptions


@pytest.fixture
def script(tmp_path):
    return slurm_stand_ins.runner(tmp_path)


RUN = ("outputs/run", "--limit=10")
EVALUATION = [str(ROOT), "evaluate", f"{ROOT}/outputs/run", "--watch", "--limit=10"]


def test_paths_of_an_evaluation_are_relative_to_the_folder_of_submission(script, tmp_path):
    """But it runs in the repository, as the training did, whose config may have relative paths."""
    folder, spool = tmp_path / "my jobs", tmp_path / "spool" / "evaluate.sbatch"
    for path in (folder, spool.parent):
        path.mkdir()
    shutil.copy(SLURM / "evaluate.sbatch", spool)
    args = [
        "my run",
        "--tasks=a,b",
        "--include-path",
        "my tasks",
        "--task_data=x=y",
        "--limit",
        "1",
    ]
    command = f"{SLURM}/evaluate.sbatch {' '.join(args)}"
    result, calls = script(spool, *args, cwd=folder, COMMAND=command)
    assert result.returncode == 0, result.stderr
    expected = [
        f"{folder}/my run",
        "--watch",
        "--tasks=a,b",
        "--include-path",
        f"{folder}/my tasks",
    ]
    assert calls == [str(ROOT), "evaluate", *expected, f"--task_data={folder}/x=y", "--limit", "1"]
    args = ["/run", "--include_path=/tasks", "--task-data", "../data"]
    result, calls = script(spool, *args, cwd=folder, COMMAND=command)
    expected = ["/run", "--watch", "--include_path=/tasks", "--task-data", f"{tmp_path}/data"]
    assert calls[2:] == expected


def test_the_script_knows_all_options_that_are_paths():
    hints = get_type_hints(evaluate.main) | get_type_hints(HarnessOptions)
    paths = {name for name, hint in hints.items() if Path in (hint, *get_args(hint))}
    assert paths == {"model", "include_path", "task_data", "output"}  # the last not with --watch


@pytest.mark.parametrize(
    ("signal_name", "state", "code", "queued"),
    [
        ("USR1", "RUNNING", -signal.SIGKILL, ["scontrol requeue 7"]),
        ("USR1", "CANCELLED", 143, []),
        ("TERM", "RUNNING", 143, []),
    ],
    ids=["time limit", "cancelled near the time limit", "cancelled"],
)
def test_an_evaluation_removes_its_files_before_it_is_queued_again(
    script, signal_name, state, code, queued
):
    result, calls = script("evaluate.sbatch", *RUN, STATE=state)
    assert (result.returncode, calls) == (0, EVALUATION)
    result, calls = script("evaluate.sbatch", *RUN, SIGNAL=signal_name, STATE=state)
    assert result.returncode == code, result.stderr
    assert calls == [*EVALUATION, "files removed", *queued]
    assert "Job 7, start 1: evaluating outputs/run\n" in result.stdout


@pytest.mark.parametrize(
    ("signal_name", "queued"), [("USR1", ["scontrol requeue 7"]), ("TERM", [])]
)
def test_an_evaluation_is_not_started_after_a_signal(script, signal_name, queued):
    result, calls = script("evaluate.sbatch", *RUN, EARLY=signal_name)
    assert result.returncode == (-signal.SIGKILL if queued else 143), result.stderr
    assert calls == queued


@pytest.mark.parametrize("code", ["2", "143"])
def test_an_evaluation_that_fails_is_not_queued_again(script, code):
    result, calls = script("evaluate.sbatch", *RUN, EXIT_CODE=code)
    assert (result.returncode, calls) == (int(code), EVALUATION)


@pytest.mark.parametrize("args", [[], ["--limit=10", "outputs/run"]])
def test_an_evaluation_needs_a_run(script, args):
    result, calls = script("evaluate.sbatch", *args)
    assert (result.returncode, calls) == (2, [])
    assert result.stderr == (
        "evaluate.sbatch: the folder of a run must follow: evaluate.sbatch RUN [OPTIONS]\n"
    )


@pytest.mark.parametrize(
    ("extra", "including"),
    [("data", ["data", "demo", "dev"]), ("demo", ["demo", "dev"]), ("eval", ["eval", "dev"])],
)
def test_an_extra_is_installed_unless_one_that_includes_it_is(tmp_path, extra, including):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$*" >> "$RECORD"\n')
    python.chmod(0o755)
    (tmp_path / "pyproject.toml").touch()
    os.utime(tmp_path / "pyproject.toml", (0, 0))
    record = tmp_path / "record"
    variables = {"RECORD": str(record), "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    for present in ("data", "demo", "eval", "dev"):
        stamp = python.parents[1] / f".installed-{present}"
        stamp.touch()
        record.write_text("")
        subprocess.run(
            ["bash", "-euc", f". {ROOT}/scripts/venv.sh {extra}"],
            cwd=tmp_path,
            env=os.environ | variables,
            capture_output=True,
            check=True,
        )
        assert (f"--editable .[{extra}]" in record.read_text()) == (present not in including)
        for found in python.parents[1].glob(".installed-*"):
            assert found == stamp or found.name == f".installed-{extra}"
            found.unlink()
