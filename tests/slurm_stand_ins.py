"""The batch scripts with stand-ins for Slurm's commands."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from jobs import ROOT

SLURM = ROOT / "scripts" / "slurm"
BATCH_SCRIPTS = ("train.sbatch", "tokenize.sbatch", "evaluate.sbatch")
STAND_INS = {
    "python": f"""
        if [[ $2 == torchtitan.experiments.tst.launch ]]; then
            echo "node ${{SLURM_NODEID:-}}: $*" >> "$RECORD"
            exit "$EXIT_CODE"
        elif [[ $2 == torchtitan.experiments.tst && -z ${{REAL:-}} ]]; then
            shift 2
            [[ $1 != tokenize ]] || exec printf '%s\n' "$PWD" "$@" > "$RECORD"
            [[ $1 != evaluate ]] || exec evaluate "$PWD" "$@"
            echo "tst $*" >> "$RECORD"
            [[ $1 != train ]] || exit "$EXIT_CODE"
            exit
        fi
        [[ -z ${{EARLY:-}} ]] || kill "-$EARLY" "$SCRIPT" # while the script looks for the package
        exec {sys.executable} "$@"
    """,
    "evaluate": """
        printf '%s\n' "$@" > "$RECORD"
        trap 'sleep 0.3; echo "files removed" >> "$RECORD"; exit 143' TERM
        if [[ -n ${SIGNAL:-} ]]; then
            kill "-$SIGNAL" "$SCRIPT"
            sleep 60 &> /dev/null &
            wait
        fi
        exit "$EXIT_CODE"
    """,
    "srun": """
        while [[ $1 == --* ]]; do echo "$1" >> "$RECORD.srun"; shift; done
        echo "exports ${SRUN_EXPORT_ENV:-$SLURM_EXPORT_ENV}" >> "$RECORD.srun"
        for SLURM_NODEID in 0 1; do
            export SLURM_NODEID
            "$@" || code=$?
        done
        exit "${code:-0}"
    """,
    "squeue": 'echo "$STATE"',
    "scontrol": """
        if [[ $1 == show ]]; then
            echo "   Command=$COMMAND"
        else # Slurm ends the job that it queues again
            echo "scontrol $*" >> "$RECORD"
            kill -KILL $PPID
        fi
    """,
    "scancel": 'echo "scancel $*" >> "$RECORD"',
    "sbatch": """
        line=$(printf ' %q' "$@")
        echo "sbatch$line" >> "$RECORD"
        [[ $* != *nowhere* ]] || exit 1
        grep -c sbatch "$RECORD"
    """,
}


def runner(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess, list[str]]]:
    """Return a function that runs a batch script as the first node of job 7 on two.

    It returns the script's result and what it called. The job is one of sbatch --export=NONE, with
    variables that reach it all the same. These variables change what the stand-ins do:

    - REAL=1: the commands of ``tst`` are run; otherwise they are only written down.
    - STATE: state of the job for squeue.
    - SIGNAL: an evaluation sends this signal to the script, and waits for its own end.
    - EARLY: the same signal, sent while the script prepares the environment.

    Args:
        tmp_path: a folder for the stand-ins and for the job.
    """
    tools, record = tmp_path / "bin", tmp_path / "record"
    tools.mkdir()
    for name, content in STAND_INS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{content}")
        (tools / name).chmod(0o755)
    (tmp_path / "job.toml").touch()

    def run(path, *args, cwd=ROOT, **variables):
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        settings = {"CONFIG_FILE": str(tmp_path / "job.toml"), "NGPU": "4", "EXIT_CODE": "0"}
        tool_path = f"{tools}:{sys.prefix}/bin:{os.environ['PATH']}"
        others = {"PATH": tool_path, "VIRTUAL_ENV": sys.prefix, "STATE": "RUNNING"}
        others |= {"RECORD": str(record), "SLURM_SUBMIT_DIR": str(cwd), "SLURM_EXPORT_ENV": "NONE"}
        record.write_text("")
        result = subprocess.run(
            ["bash", "-c", 'SCRIPT=$$ exec bash "$@"', "bash", str(SLURM / path), *args],
            cwd=cwd,
            env=os.environ | job | settings | others | variables,
            capture_output=True,
            text=True,
        )
        return result, record.read_text().splitlines()

    return run
