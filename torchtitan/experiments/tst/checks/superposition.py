"""Check that the keys of ``[superposition]`` fit together, and fit the rest of the job."""

from typing import Any

from ..config.sections import Superposition
from ..config.stages import bag_sizes_of, schedule_of, steps_of_stages
from ..core import Schedule
from ..errors import ConfigError


def check_superposition(section: Superposition, training: Any, saves: bool) -> Schedule:
    """Check the section, and that its bags fit the job's batches.

    Args:
        section: the section.
        training: the section ``[training]`` of the job: ``steps``, ``seq_len`` and
            ``local_batch_size``.
        saves: whether the job writes checkpoints.

    Returns:
        The job's schedule.

    Raises:
        ConfigError: if keys do not fit together.
    """
    if section.bag_size != 1:
        _check_steps(section, training.steps)
        _check_choices(section)
    schedule = schedule_of(section, training.steps)
    if schedule.enabled:
        _check_shapes(section, training, schedule)
    if section.stop_at_boundary and not (schedule.enabled and saves):
        raise ConfigError(
            "superposition.stop_at_boundary",
            True,
            "needs superposition steps (bag_size, and step_ratio or steps) and "
            "checkpoint.enable = true",
        )
    if section.checkpoint_each_stage and schedule.enabled and not saves:
        raise ConfigError(
            "superposition.checkpoint_each_stage", True, "needs checkpoint.enable = true"
        )
    return schedule


def _check_steps(section: Superposition, total_steps: int) -> None:
    """Check that the steps of the stages are given once, and end before the run does."""
    ratio, steps = section.step_ratio, section.steps
    if ratio is not None and steps is not None:
        raise ConfigError(
            f"superposition.step_ratio = {ratio!r} and superposition.steps",
            steps,
            "give one of the two (on the command line, --superposition.step_ratio None unsets one)",
        )
    if ratio is None and steps is None:
        raise ConfigError(
            "superposition.bag_size",
            section.bag_size,
            "needs superposition.step_ratio in [0, 1) or superposition.steps < training.steps",
        )
    name = "steps" if steps is not None else "step_ratio"
    value, stages = getattr(section, name), len(bag_sizes_of(section))
    if isinstance(value, list) and len(value) != stages:
        raise ConfigError(
            f"superposition.{name}",
            value,
            f"has {len(value)} values, but superposition.bag_size = {section.bag_size} has "
            f"{stages}; give one for each bag size, or one number for all stages together",
        )
    boundary = sum(steps_of_stages(section, total_steps))
    if boundary >= total_steps:
        raise ConfigError(
            f"superposition.{name}",
            value,
            f"{boundary} superposition steps must be fewer than training.steps = {total_steps}",
        )


def _check_choices(section: Superposition) -> None:
    """Check that loss, weighting, mode and scale fit together."""
    if section.loss != "mce" and section.weighting != "uniform":
        raise ConfigError(
            "superposition.weighting",
            section.weighting,
            f'must be "uniform" with superposition.loss = {section.loss!r}, which sees a bag as a '
            "set",
        )
    if section.mode == "output" and section.scale == "batch":
        raise ConfigError(
            "superposition.scale",
            section.scale,
            'must be "sequence" with superposition.mode = "output", which reads no extra data',
        )


def _check_shapes(section: Superposition, training: Any, schedule: Schedule) -> None:
    """Check that sequences can be divided into the bags of each stage."""
    for stage in schedule.stages:
        try:
            schedule.batch_shape(stage.first, training.local_batch_size, training.seq_len)
        except ValueError:
            raise ConfigError(
                "training.seq_len",
                training.seq_len,
                f"must be a multiple of the bag size {stage.bag_size} with "
                'superposition.scale = "batch"',
            ) from None
        if schedule.mode == "output" and stage.bag_size > training.seq_len:
            raise ConfigError(
                "superposition.bag_size",
                section.bag_size,
                f"the bag size {stage.bag_size} must be at most training.seq_len = "
                f'{training.seq_len} with superposition.mode = "output"',
            )
