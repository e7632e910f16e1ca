"""Check a job from its config and files, before a process group or a device is used."""

import os
import tempfile
from pathlib import Path

from torchtitan.config import JobConfig

from ..config.job_config import resilience_section, superposition_section
from ..config.layout import dp_degree
from ..config.values import check_values
from ..core import Schedule
from ..errors import ConfigError
from .agreement import run_facts
from .checkpoint import check_agreement, check_last_save, check_loading
from .combinations import check_combinations
from .data import check_data
from .extensions import register_extensions
from .layout import check_layout
from .machine import check_machine
from .model import model_args_of
from .superposition import check_superposition
from .tokenizer import check_tokenizer


def check_job(
    job_config: JobConfig,
    ranks: int | None = None,
    *,
    machine: bool = True,
    files: bool = True,
) -> Path | None:
    """Check that the job can run.

    Args:
        job_config: config of the job.
        ranks: number of processes of the job; None for those of this launch.
        machine: check this machine, too; set it if the job runs here.
        files: check tokenizer, data, folders and checkpoints, too; set it if they are here.

    Returns:
        The checkpoint that the job loads, from :func:`.checkpoint.check_loading`.

    Raises:
        ConfigError: if the job cannot run; names the key, its value and what is allowed.
        CheckpointError: if the config contradicts the checkpoint that the job would resume from.
    """
    ranks = ranks or _ranks(job_config)
    schedule = check_config(job_config, ranks)
    if machine:
        check_machine(job_config)
    if not files:
        return None
    tokenizer = check_tokenizer(job_config)
    degree = dp_degree(job_config, ranks)
    mixture = check_data(job_config, schedule, tokenizer, degree)
    _check_folders(job_config)
    if checkpoint := check_loading(job_config):
        facts = run_facts(job_config, schedule, tokenizer, mixture, degree)
        check_agreement(job_config, facts, checkpoint)
    return checkpoint


def check_config(job_config: JobConfig, ranks: int) -> Schedule:
    """Check the values of a config and that they fit together, without files or this machine.

    Args:
        job_config: config of the job.
        ranks: number of processes of the job.

    Returns:
        The job's schedule.

    Raises:
        ConfigError: if the job cannot run; names the key, its value and what is allowed.
    """
    check_values(job_config)
    register_extensions(job_config)
    check_combinations(job_config, model_args_of(job_config))
    schedule = check_superposition(
        superposition_section(job_config), job_config.training, job_config.checkpoint.enable
    )
    check_layout(job_config, schedule, ranks)
    check_last_save(job_config)
    skipped = resilience_section(job_config).max_skipped_steps
    if skipped and job_config.optimizer.early_step_in_backward:
        raise ConfigError(
            "resilience.max_skipped_steps",
            skipped,
            "must be 0 with optimizer.early_step_in_backward = true, which cannot skip a step",
        )
    return schedule


def _check_folders(job_config: JobConfig) -> None:
    """Check that the run can create files in its folders."""
    dump_folder = Path(job_config.job.dump_folder)
    places = {"job.dump_folder": dump_folder}
    if job_config.checkpoint.enable and not job_config.checkpoint.load_only:
        places["checkpoint.folder"] = dump_folder / job_config.checkpoint.folder
    for key, folder in places.items():
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise ConfigError(
                key,
                str(folder),
                f"cannot write to {existing}: {error.strerror}; choose another folder",
            ) from None


def _ranks(job_config: JobConfig) -> int:
    """Return the number of processes of this launch."""
    name = "WORLD_SIZE" if job_config.comm.mode == "default" else "NGPU"
    return int(os.environ.get(name, "1"))
