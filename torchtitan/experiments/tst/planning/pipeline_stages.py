"""The parts of a model on the ranks of a pipeline, and the micro-batches that the ranks keep."""

import dataclasses
import math

from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
    get_schedule_class,
)
from torchtitan.config import JobConfig
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part


@dataclasses.dataclass(frozen=True)
class PipelineRank:
    """One rank of a pipeline.

    Attributes:
        layers: number of layers in all its stages.
        stages: number of its stages.
        embedding: whether it has the first stage.
        head: whether it has the last stage.
        in_flight: micro-batches whose activations it keeps at once for a stage, a mean over its
            stages.
    """

    layers: int
    stages: int
    embedding: bool
    head: bool
    in_flight: float


def pipeline_ranks(job_config: JobConfig, degree: int, layers: int) -> list[PipelineRank]:
    """Return the ranks of a pipeline that has passed the checks, in order.

    Args:
        job_config: the job's config; its degree is ignored.
        degree: number of ranks of the pipeline; 1 for no pipeline.
        layers: number of layers of the model.
    """
    if degree == 1:
        return [PipelineRank(layers, 1, True, True, 1)]
    layout = job_config.parallelism
    schedule = get_schedule_class(layout.pipeline_parallel_schedule)
    parts = layout.module_fqns_per_model_part or generate_llm_fqn_per_model_part(
        _stages(job_config, degree, layers, schedule),
        layers,
        layout.pipeline_parallel_first_stage_less_layers,
        layout.pipeline_parallel_last_stage_less_layers,
    )
    microbatches = microbatches_of(job_config)
    return [
        _rank(rank, degree, parts, schedule, microbatches)  # each part is a list of module names
        for rank in range(degree)
    ]


def microbatches_of(job_config: JobConfig) -> int:
    """Return the micro-batches that a pipeline cuts the local batch into."""
    size = job_config.parallelism.pipeline_parallel_microbatch_size
    return job_config.training.local_batch_size // size


def bubble(ranks: list[PipelineRank], microbatches: int) -> float:
    """Return the idle time of a pipeline as a share of the time that it computes.

    The formula is that of 1F1B and its interleaved form. Zero-bubble schedules idle less.
    """
    return (len(ranks) - 1) / (microbatches * ranks[0].stages)


def _stages(job_config: JobConfig, degree: int, layers: int, schedule: type) -> int:
    layout = job_config.parallelism
    if (per_stage := layout.pipeline_parallel_layers_per_stage) is None:
        return degree * (1 if issubclass(schedule, PipelineScheduleSingle) else 2)
    first = layout.pipeline_parallel_first_stage_less_layers
    last = layout.pipeline_parallel_last_stage_less_layers
    return math.ceil((layers + first + last) / per_stage)


def _rank(
    rank: int, degree: int, parts: list[list[str]], schedule: type, microbatches: int
) -> PipelineRank:
    own = list(range(rank, len(parts), degree))
    if schedule in (ScheduleZBVZeroBubble, ScheduleDualPipeV):
        own = [rank, len(parts) - 1 - rank]
    names = [name for stage in own for name in parts[stage]]
    return PipelineRank(
        layers=sum(name.startswith("layers.") for name in names),
        stages=len(own),
        embedding="tok_embeddings" in names,
        head="output" in names,
        in_flight=min(microbatches, _in_flight(rank, degree, len(own), schedule)),
    )


def _in_flight(rank: int, degree: int, stages: int, schedule: type) -> float:
    """Return the micro-batches that a rank keeps for a stage when there are enough of them."""
    if schedule in (ScheduleGPipe, ScheduleLoopedBFS):
        return math.inf
    if schedule in (ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble):
        return degree  # activations are kept until the backward of the weights
    if schedule is ScheduleDualPipeV:
        return degree + 1 / stages
    # 1F1B warms up with one micro-batch for each later rank. Its interleaved form warms up with two
    # for each later rank, and with one for each other stage of each rank.
    first, each = (1, 1) if stages == 1 else ((stages - 1) * degree + 1, 2)
    return (first + each * (degree - 1 - rank)) / stages
