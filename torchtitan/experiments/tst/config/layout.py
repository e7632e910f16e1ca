"""The ranks and the batches of a job, from its config: TorchTitan 0.2.2's, or one with its keys."""

import math
from typing import Any, Literal


def ranks_of_layout(job_config: Any) -> tuple[int, bool]:
    """Return the number of ranks of a layout, and whether multiples of it are allowed, too.

    The number is the product of the degrees in ``[parallelism]``. Multiples are allowed with
    ``data_parallel_shard_degree = -1``, which uses all ranks that there are. The number is then the
    smallest one whose ranks can share the experts.
    """
    layout = job_config.parallelism
    ranks = _ranks_of_model(job_config) * layout.data_parallel_replicate_degree
    if layout.data_parallel_shard_degree != -1:
        return ranks * layout.data_parallel_shard_degree, False
    # Experts and the other parameters are sharded over the same ranks.
    of_experts = layout.expert_parallel_degree * layout.expert_tensor_parallel_degree
    shards = layout.context_parallel_degree * layout.tensor_parallel_degree
    return ranks * (math.lcm(of_experts, shards) // shards), True


def dp_degree(job_config: Any, ranks: int) -> int:
    """Return the data-parallel degree of a job on ``ranks`` ranks."""
    return max(1, ranks // _ranks_of_model(job_config))


def _ranks_of_model(job_config: Any) -> int:
    """Return the number of ranks that read the same data."""
    layout = job_config.parallelism
    return (
        layout.context_parallel_degree
        * layout.tensor_parallel_degree
        * layout.pipeline_parallel_degree
    )


def global_batch_size(job_config: Any, dp_degree: int) -> int:
    """Return the number of sequences in an ordinary step on ``dp_degree`` data-parallel ranks."""
    training = job_config.training
    if training.global_batch_size < 0:
        return training.local_batch_size * dp_degree
    return training.global_batch_size


def compiles(job_config: Any, component: Literal["model", "loss"]) -> bool:
    """Return whether the job compiles a component with torch.compile."""
    return job_config.compile.enable and component in job_config.compile.components
