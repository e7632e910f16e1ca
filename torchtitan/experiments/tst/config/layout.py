"""The ranks and the batches of a job, from its config."""

import math
from typing import Literal

from torchtitan.config import JobConfig


def ranks_of_layout(job_config: JobConfig) -> tuple[int, bool]:
    """Ranks that the degrees of ``[parallelism]`` make, and whether it is any multiple of them.

    It is with ``data_parallel_shard_degree = -1``, which takes as many as there are, if experts are
    shared by whole groups of them.
    """
    layout = job_config.parallelism
    ranks = _ranks_of_model(job_config) * layout.data_parallel_replicate_degree
    if layout.data_parallel_shard_degree != -1:
        return ranks * layout.data_parallel_shard_degree, False
    # the shards of other parameters and the ranks of experts are the same ranks
    of_experts = layout.expert_parallel_degree * layout.expert_tensor_parallel_degree
    shards = layout.context_parallel_degree * layout.tensor_parallel_degree
    return ranks * (math.lcm(of_experts, shards) // shards), True


def dp_degree(job_config: JobConfig, ranks: int) -> int:
    """Data-parallel ranks of ``ranks`` processes."""
    return max(1, ranks // _ranks_of_model(job_config))


def _ranks_of_model(job_config: JobConfig) -> int:
    """Ranks that read the same data."""
    layout = job_config.parallelism
    return (
        layout.context_parallel_degree
        * layout.tensor_parallel_degree
        * layout.pipeline_parallel_degree
    )


def global_batch_size(job_config: JobConfig, dp_degree: int) -> int:
    """Sequences in an ordinary step on ``dp_degree`` data-parallel ranks."""
    training = job_config.training
    if training.global_batch_size < 0:
        return training.local_batch_size * dp_degree
    return training.global_batch_size


def compiles(job_config: JobConfig, component: Literal["model", "loss"]) -> bool:
    """Whether torch.compile is to compile a component."""
    return job_config.compile.enable and component in job_config.compile.components
