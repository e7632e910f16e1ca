"""What must fit together in ``[superposition]``, and with the rest of the job."""

from torchtitan.config import JobConfig

from ..config.schedule import boundary_step, build_schedule
from ..config.sections import Superposition, superposition_section
from ..core import Schedule
from ..errors import ConfigError


def check_superposition(job_config: JobConfig) -> Schedule:
    """Check the section, and whether its bags fit the job's batches.

    Returns:
        The job's schedule.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    section = superposition_section(job_config)
    if section.bag_size > 1:
        _check_steps(section, job_config.training.steps)
        _check_choices(section)
    schedule = build_schedule(job_config)
    if schedule.enabled:
        _check_shapes(job_config, schedule)
    if section.stop_at_boundary and not (schedule.enabled and job_config.checkpoint.enable):
        raise ConfigError(
            "superposition.stop_at_boundary",
            True,
            "needs superposition steps (bag_size, steps) and checkpoint.enable",
        )
    return schedule


def _check_steps(section: Superposition, total_steps: int) -> None:
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
    boundary = boundary_step(section, total_steps)
    if boundary >= total_steps:
        name = "steps" if steps is not None else "step_ratio"
        raise ConfigError(
            f"superposition.{name}",
            getattr(section, name),
            f"{boundary} superposition steps must be fewer than training.steps = {total_steps}",
        )


def _check_choices(section: Superposition) -> None:
    if section.loss != "mce" and section.weighting != "uniform":
        raise ConfigError(
            "superposition.weighting",
            section.weighting,
            f'must be "uniform" with superposition.loss = {section.loss!r}: the bag is a set',
        )
    if section.mode == "output" and section.scale == "batch":
        raise ConfigError(
            "superposition.scale",
            section.scale,
            'must be "sequence" with superposition.mode = "output", which reads no extra data',
        )


def _check_shapes(job_config: JobConfig, schedule: Schedule) -> None:
    training = job_config.training
    try:
        schedule.batch_shape(1, training.local_batch_size, training.seq_len)
    except ValueError as error:
        raise ConfigError(
            "training.seq_len",
            training.seq_len,
            f'{error}, superposition.bag_size, as superposition.scale = "batch" needs',
        ) from None
    if schedule.mode == "output" and schedule.bag_size > training.seq_len:
        raise ConfigError(
            "superposition.bag_size",
            schedule.bag_size,
            "the next s tokens do not fit into a sequence of "
            f"training.seq_len = {training.seq_len} tokens",
        )
