"""Check that the ranks of a job fit its layout and its batches, with TorchTitan 0.2.2 and 0.3."""

from typing import Any

from ..config.layout import dp_degree, ranks_of_layout
from ..errors import ConfigError


def check_ranks(job_config: Any, ranks: int) -> None:
    """Check that the degrees and the batches of a job fit ``ranks`` processes.

    Raises:
        ConfigError: if they do not fit.
    """
    _check_degrees(job_config, ranks)
    _check_batch(job_config, dp_degree(job_config, ranks))
    _check_seed_checkpoint(job_config, ranks)
    _check_offload(job_config, ranks)


def _check_degrees(job_config: Any, ranks: int) -> None:
    """Check that the product of the degrees is the number of ranks."""
    layout = job_config.parallelism
    wanted, free = ranks_of_layout(job_config)
    if ranks % wanted if free else ranks != wanted:
        raise ConfigError(
            "parallelism.data_parallel_shard_degree",
            layout.data_parallel_shard_degree,
            f"with the other degrees needs {'a multiple of ' if free else ''}{wanted} ranks, but "
            f"there are {ranks}; change the number of ranks or a degree"
            + ("" if free else " (-1 uses all ranks)"),
        )


def _check_seed_checkpoint(job_config: Any, ranks: int) -> None:
    """Check that a job that creates a seed checkpoint runs on one rank."""
    key = "checkpoint.create_seed_checkpoint"
    if not job_config.checkpoint.create_seed_checkpoint:
        return
    if not job_config.checkpoint.enable:
        raise ConfigError(key, True, "needs checkpoint.enable = true")
    if ranks > 1:
        raise ConfigError(key, True, f"needs 1 rank, not {ranks}; launch one process")


def _check_offload(job_config: Any, ranks: int) -> None:
    """Check that CPU offload is used with FSDP only."""
    layout, seed = job_config.parallelism, job_config.checkpoint.create_seed_checkpoint
    replicas = layout.data_parallel_replicate_degree * layout.tensor_parallel_degree
    shards = ranks // (replicas * layout.pipeline_parallel_degree)  # includes context parallel
    if job_config.training.enable_cpu_offload and shards == 1 and not seed:
        raise ConfigError(
            "training.enable_cpu_offload",
            True,
            "needs FSDP: set parallelism.data_parallel_shard_degree above 1, or this key to false",
        )


def _check_batch(job_config: Any, dp_degree: int) -> None:
    """Check that the global batch can be divided into micro-batches of all ranks."""
    training = job_config.training
    at_once = training.local_batch_size * dp_degree
    if training.global_batch_size > 0 and training.global_batch_size % at_once:
        raise ConfigError(
            "training.global_batch_size",
            training.global_batch_size,
            f"must be a multiple of {at_once} (training.local_batch_size = "
            f"{training.local_batch_size} on each of {dp_degree} data-parallel ranks)",
        )
