"""The superposition schedule of a job, from its config."""

from torchtitan.config import JobConfig

from ..core import Schedule
from .job_config import superposition_section
from .stages import bag_sizes_of, schedule_of, steps_of_stages


def build_schedule(job_config: JobConfig) -> Schedule:
    """Return the schedule of a job; without superposition, all steps are recovery."""
    return schedule_of(superposition_section(job_config), job_config.training.steps)


def stages_without_steps(job_config: JobConfig) -> list[tuple[int, int]]:
    """Return the number (from 1) and the bag size of each stage without steps."""
    section = superposition_section(job_config)
    if section.bag_size == 1:
        return []
    steps = steps_of_stages(section, job_config.training.steps)
    stages = enumerate(zip(bag_sizes_of(section), steps, strict=True), 1)
    return [(number, size) for number, (size, count) in stages if not count]
