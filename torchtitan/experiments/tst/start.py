"""Start a job on this machine: check it in this process, then replace this process by its launcher.

No process is started for a job that cannot run, so its error is printed once.
"""

import os
import re
import subprocess
import sys
import tempfile
from typing import NoReturn

from torchtitan.config import JobConfig

from .checks.job import check_config, check_job
from .config.manager import SuperpositionConfigManager
from .config.schedule import build_schedule
from .core import Schedule
from .data.demo_corpus import make_if_read
from .launch import ENVIRONMENT, check_processes, handle_stop_signals, replace_by_launcher
from .planning.numbers import numbers
from .planning.plan import parameters_of

TRAIN_MODULE = f"{__package__}.train"

# A single rank has no whole model to load or save, and nothing to record.
_ONE_RANK = (
    "--superposition.no-checkpoint_each_stage",
    "--superposition.no-stop_at_boundary",
    "--checkpoint.no-enable",
    "--checkpoint.load_step=-1",
    "--checkpoint.initial_load_path=None",
    "--checkpoint.no-initial_load_in_hf",
    "--checkpoint.no-create_seed_checkpoint",
    "--profiling.no-enable_profiling",
    "--profiling.no-enable_memory_snapshot",
    "--metrics.no-enable_wandb",
)
# For another module than TRAIN_MODULE: its keys may be unknown here.
_EACH_PHASE = ("--training.steps=2", "--superposition.steps=None", "--superposition.step_ratio=0.5")


def read(arguments: list[str]) -> JobConfig:
    """Return the config of a job.

    Args:
        arguments: arguments of the job, as on the command line.

    Raises:
        ConfigError: if they or the job's TOML cannot be read.
    """
    return SuperpositionConfigManager().parse_args(arguments)


def check(
    job_config: JobConfig, ranks: int, *, machine: bool = True, files: bool = True
) -> list[str]:
    """Check that a job can start; make the demo's corpus if the job reads it.

    Args:
        job_config: config of the job.
        ranks: number of processes of the job.
        machine: check this machine, too; set it if the job runs here.
        files: check tokenizer, data, folders and checkpoints, too; set it if they are here.

    Returns:
        The job's numbers (ranks, batch, tokens, steps of each stage), as lines of text.

    Raises:
        ConfigError: if the job cannot run; names the key, its value and what is allowed.
        CheckpointError: if the config contradicts the checkpoint that the job would resume from.
    """
    check_config(job_config, ranks)
    if files:
        make_if_read(job_config)
    checkpoint = check_job(job_config, ranks, machine=machine, files=files)
    lines = numbers(job_config, build_schedule(job_config), parameters_of(job_config), ranks)
    return [*lines, f"loads {checkpoint}"] if checkpoint else lines


def start(arguments: list[str], processes: int, log_rank: str, module: str) -> NoReturn:
    """Check a job and replace this process by its launcher, :mod:`.launch`.

    A job with ``comm.mode = "fake_backend"`` runs in one process, as rank 0 of ``processes``. It
    runs a step of each stage and of recovery. With another module than :mod:`.train`, whose keys
    may be unknown here, it runs a step of each phase.

    Args:
        arguments: arguments of the job, as on the command line.
        processes: number of processes.
        log_rank: ranks whose output is shown, such as "0,1".
        module: module that each process runs; only a job of :mod:`.train` is checked.

    Raises:
        ConfigError: as :func:`check`.
        CheckpointError: as :func:`check`.
    """
    handle_stop_signals()
    if module == TRAIN_MODULE:
        job_config = read(arguments)
        if job_config.comm.mode != "default":
            make_if_read(job_config)
            check_config(job_config, processes)
            sys.exit(
                _run_rank_0(
                    arguments, processes, module, _one_step_each(build_schedule(job_config))
                )
            )
        check_processes(processes)
        check(job_config, processes)
    elif re.search(r"--comm\.mode[= ]fake_backend\b", " ".join(arguments)):
        sys.exit(_run_rank_0(arguments, processes, module))
    replace_by_launcher(arguments, processes, log_rank, module)


def _one_step_each(schedule: Schedule) -> tuple[str, ...]:
    """Return the arguments for a step of each stage and one of recovery."""
    stages = schedule.stages
    bag_sizes = ",".join(f"{stage.bag_size}" for stage in stages) or "1"
    return (
        f"--superposition.bag_size={bag_sizes}",
        f"--superposition.steps={','.join('1' for _ in stages) or '0'}",
        "--superposition.step_ratio=None",
        f"--training.steps={len(stages) + 1}",
    )


def _run_rank_0(
    arguments: list[str], ranks: int, module: str, steps: tuple[str, ...] = _EACH_PHASE
) -> int:
    """Run a few steps as rank 0, and return the exit code."""
    of_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": f"{ranks}", "NGPU": f"{ranks}"}
    with tempfile.TemporaryDirectory() as folder:
        all_arguments = [*arguments, *_ONE_RANK, *steps, f"--job.dump_folder={folder}"]
        command = [sys.executable, "-m", module, *all_arguments]
        return subprocess.run(command, env=ENVIRONMENT | os.environ | of_rank).returncode
