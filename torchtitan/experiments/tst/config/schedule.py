"""The schedule of a run, from its config."""

from torchtitan.config import JobConfig

from ..core import Schedule
from .sections import Superposition, superposition_section


def build_schedule(job_config: JobConfig) -> Schedule:
    """The run's schedule; with superposition off, one that is all recovery."""
    section = superposition_section(job_config)
    if section.bag_size == 1:
        return Schedule()
    boundary = boundary_step(section, job_config.training.steps)
    return Schedule(section.bag_size, boundary, section.mode, section.scale)


def boundary_step(section: Superposition, total_steps: int) -> int:
    """K, the last superposition step; a ratio gives the nearest whole step."""
    if section.steps is not None:
        return section.steps
    assert section.step_ratio is not None  # check_job() has seen to it
    return round(section.step_ratio * total_steps)
