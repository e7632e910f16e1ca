"""Read, check and start a job on TorchTitan 0.3; :mod:`..start` does so on 0.2.2."""

from typing import Any, NoReturn

import torch

from ..checks.loading import check_keys_of_shards, check_workers
from ..checks.ranks import check_ranks
from ..core import Schedule
from ..data.demo_corpus import make_if_read
from ..errors import ConfigError
from ..launch import check_processes, handle_stop_signals, replace_by_launcher
from ..planning.numbers import numbers
from .checks import check_config
from .job import to_config
from .job_config import read as read
from .job_data import check_data, warn_of_documents
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
    config = to_config(job)
    schedule = check_config(config)
    check_workers(job, schedule)
    _check_lengths(job, schedule)
    check_ranks(job, ranks)
    if files:
        make_if_read(job)
        check_data(job)
    warn_of_documents(job)
    return numbers(job, schedule, _parameters(config), ranks)


def _check_lengths(job: Any, schedule: Schedule) -> None:
    """Check that sequences can be cut for tensor and context parallelism, in every stage."""
    layout, training, validation = job.parallelism, job.training, job.validation
    tensor, context = layout.tensor_parallel_degree, layout.context_parallel_degree
    divisor = tensor * (2 * context if context > 1 else 1)
    for stage in schedule.until(training.steps):
        shape = schedule.batch_shape(stage.first, training.local_batch_size, training.seq_len)
        if shape.latents % divisor:
            raise ConfigError(
                "training.seq_len",
                training.seq_len,
                f"gives {shape.latents} latents in {stage.phase}, which must be a multiple of "
                f"{divisor} with parallelism.tensor_parallel_degree = {tensor} and "
                f"parallelism.context_parallel_degree = {context}",
            )
    if validation.enable and validation.seq_len > training.seq_len:
        raise ConfigError(
            "validation.seq_len",
            validation.seq_len,
            f"must be at most training.seq_len = {training.seq_len}, the model's sequence length",
        )


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
