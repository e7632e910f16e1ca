"""Read, check and start a job on TorchTitan 0.3; :mod:`..start` does so on 0.2.2."""

import re
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..checks.loading import check_keys_of_shards, check_workers
from ..checks.ranks import check_ranks
from ..checks.superposition import check_superposition
from ..core import Schedule
from ..data.demo_corpus import make_if_read
from ..errors import ConfigError
from ..launch import check_processes, handle_stop_signals, replace_by_launcher
from ..planning.numbers import numbers
from .checks import check_config
from .job import to_config
from .job_config import read as read
from .job_data import check_data, warn_of_documents
from .record import check_record
from .trainer import SuperpositionTrainer

TRAIN_MODULE = f"{__package__}.train"


def check(job: Any, ranks: int, *, machine: bool = True, files: bool = True) -> list[str]:
    """Check that a job can start; make the demo's corpus if the job reads it.

    Args:
        job: result of ``read``.
        ranks: number of processes of the job.
        machine: check this machine, too. TorchTitan itself does so when the job starts.
        files: check tokenizer and data, too; set it if they are here.

    Returns:
        The job's numbers (ranks, batch, tokens, steps of each stage), as lines of text.

    Raises:
        ConfigError: if the job cannot run; names the key, its value and what is allowed.
    """
    check_keys_of_shards(job)
    schedule = check_superposition(job.superposition, job.training, job.checkpoint.enable)
    check_workers(job, schedule)
    config = to_config(job)
    check_config(config)
    _check_validation(job)
    check_ranks(job, ranks)
    if files:
        make_if_read(job)
        check_data(job)
        _check_resume(job, schedule)
    warn_of_documents(job)
    return numbers(job, schedule, _parameters(config), ranks)


def _check_validation(job: Any) -> None:
    """Check that the validator can use the model and the pipeline as they are for training."""
    training, validation = job.training, job.validation
    if not validation.enable:
        return
    if validation.seq_len > training.seq_len:
        raise ConfigError(
            "validation.seq_len",
            validation.seq_len,
            f"must be at most training.seq_len = {training.seq_len}, the model's sequence length",
        )
    pipeline = job.parallelism.pipeline_parallel_degree > 1
    if pipeline and validation.local_batch_size != training.local_batch_size:
        raise ConfigError(
            "validation.local_batch_size",
            validation.local_batch_size,
            f"must be training.local_batch_size = {training.local_batch_size} with a pipeline, "
            "whose number of microbatches is fixed",
        )


def _check_resume(job: Any, schedule: Schedule) -> None:
    """Check that the checkpoint that the job would resume from has had the same bags."""
    run, section = Path(job.job.dump_folder), job.checkpoint
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in (run / section.folder).glob("*")]
    steps = [int(match[1]) for match in found if match]
    if section.enable and steps:
        check_record(run, schedule, max(steps) if section.load_step == -1 else section.load_step)


def _parameters(config: SuperpositionTrainer.Config) -> int:
    """Return the number of parameters of the model, which is built without memory."""
    with torch.device("meta"):
        model = config.model_spec.model.build()
    return sum(parameter.numel() for parameter in model.parameters())


def start(arguments: list[str], processes: int, log_rank: str, module: str) -> NoReturn:
    """Check a job and replace this process by its launcher, :mod:`..launch`.

    Args:
        arguments: arguments of the job, as on the command line.
        processes: number of processes.
        log_rank: ranks whose output is shown, such as "0,1".
        module: module that each process runs; only a job of ``.train`` is checked.

    Raises:
        ConfigError: as :func:`check`.
    """
    handle_stop_signals()
    if module == TRAIN_MODULE:
        job = read(arguments)
        check_processes(processes)
        check(job, processes)
    replace_by_launcher(arguments, processes, log_rank, module)
