"""The numbers of a job that both engines share: ranks, batch, and the tokens of each stage."""

from typing import Any

from ..config.layout import dp_degree, global_batch_size
from ..core import Phase, Schedule


def numbers(job_config: Any, schedule: Schedule, parameters: int, ranks: int) -> list[str]:
    """Return a job's numbers, as lines of text.

    Args:
        job_config: config of the job.
        schedule: its schedule.
        parameters: number of parameters of its model.
        ranks: number of processes.
    """
    model, training = job_config.model, job_config.training
    degree = dp_degree(job_config, ranks)
    sequences = global_batch_size(job_config, degree)
    lines = [
        f"{model.name} {model.flavor}, {parameters:,} parameters, on {ranks} ranks",
        f"batch: {batch_in_words(sequences, degree, training.local_batch_size)}",
    ]
    for stage in schedule.until(training.steps):
        shape = schedule.batch_shape(stage.first, sequences, training.seq_len)  # of all ranks
        tokens = shape.sequences * shape.data_tokens
        bags = f", bags of {stage.bag_size} tokens" if stage.phase is Phase.SUPERPOSITION else ""
        lines.append(
            f"{stage.phase}: steps {stage.first:,} to {stage.last:,}{bags}; {tokens:,} data tokens "
            f"a step, {count(stage.steps * tokens)} in all"
        )
    return [*lines, f"run folder: {job_config.job.dump_folder}"]


def batch_in_words(sequences: int, dp_degree: int, local_batch_size: int) -> str:
    """Return the sequences of an ordinary step, in words.

    Args:
        sequences: sequences of all ranks.
        dp_degree: number of data-parallel ranks.
        local_batch_size: sequences in a micro-batch.
    """
    accumulation = sequences // (local_batch_size * dp_degree)
    return (
        f"{sequences:,} sequences = {dp_degree} data-parallel ranks x {local_batch_size} x "
        f"{accumulation} micro-batches"
    )


def count(number: float) -> str:
    """Return a number in short form, such as 104.86B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return f"{number:,.0f}"
