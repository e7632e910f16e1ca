"""Everything that would stop a job, from config and files alone.

It runs before a process group or a device is touched.
"""

import os
import tempfile
from pathlib import Path

from torchtitan.config import JobConfig

from ..config.layout import dp_degree
from ..config.sections import resilience_section
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
        job_config: of the job.
        ranks: processes that it is to run on; None for those of this launch.
        machine: whether this machine is one that it is to run on.
        files: whether its tokenizer, data, folders and checkpoints are here.

    Returns:
        The checkpoint that it loads, as :func:`.checkpoint.check_loading` tells.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
        CheckpointError: if the config contradicts the checkpoint that the job would go on from.
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
    """Check what needs neither files nor this machine: the values, and how they fit together.

    Args:
        job_config: of the job.
        ranks: processes that it is to run on.

    Returns:
        The job's schedule.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    check_values(job_config)
    register_extensions(job_config)
    check_combinations(job_config, model_args_of(job_config))
    schedule = check_superposition(job_config)
    check_layout(job_config, schedule, ranks)
    check_last_save(job_config)
    skipped = resilience_section(job_config).max_skipped_steps
    if skipped and job_config.optimizer.early_step_in_backward:
        raise ConfigError(
            "resilience.max_skipped_steps",
            skipped,
            "must be 0 with optimizer.early_step_in_backward, whose steps cannot be held back",
        )
    return schedule


def _check_folders(job_config: JobConfig) -> None:
    """Files can be made where the run will want to make them."""
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
                key, str(folder), f"cannot write to {existing}: {error.strerror}"
            ) from None


def _ranks(job_config: JobConfig) -> int:
    """Processes of this launch."""
    name = "WORLD_SIZE" if job_config.comm.mode == "default" else "NGPU"
    return int(os.environ.get(name, "1"))
