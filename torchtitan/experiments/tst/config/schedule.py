"""The superposition schedule of a job, from its config."""

import itertools
import math

from torchtitan.config import JobConfig

from ..core import Schedule
from .sections import Superposition, superposition_section


def build_schedule(job_config: JobConfig) -> Schedule:
    """Return the schedule of a job; without superposition, all steps are recovery."""
    section = superposition_section(job_config)
    if section.bag_size == 1:
        return Schedule()
    bag_sizes, steps = bag_sizes_of(section), steps_of_stages(section, job_config.training.steps)
    return Schedule.of(bag_sizes, steps, section.mode, section.scale)


def bag_sizes_of(section: Superposition) -> list[int]:
    """Return the bag size of each stage, in order."""
    return section.bag_size if isinstance(section.bag_size, list) else [section.bag_size]


def steps_of_stages(section: Superposition, total_steps: int) -> list[int]:
    """Return the number of steps of each stage, which may be 0.

    With shares, each stage ends at the nearest whole step. One share or number for all stages is
    divided equally.
    """
    stages, steps, ratio = len(bag_sizes_of(section)), section.steps, section.step_ratio
    if isinstance(steps, list):
        return steps
    if isinstance(ratio, list):
        ends = [round(math.fsum(ratio[: n + 1]) * total_steps) for n in range(stages)]
    else:
        assert steps is not None or ratio is not None  # check_job() has checked it
        boundary = round((ratio or 0) * total_steps) if steps is None else steps
        ends = [round(boundary * (n + 1) / stages) for n in range(stages)]
    return [end - begin for begin, end in itertools.pairwise([0, *ends])]


def stages_without_steps(job_config: JobConfig) -> list[tuple[int, int]]:
    """Return the number (from 1) and the bag size of each stage without steps."""
    section = superposition_section(job_config)
    if section.bag_size == 1:
        return []
    steps = steps_of_stages(section, job_config.training.steps)
    stages = enumerate(zip(bag_sizes_of(section), steps, strict=True), 1)
    return [(number, size) for number, (size, count) in stages if not count]
