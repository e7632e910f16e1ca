"""The stages of superposition, from the ``[superposition]`` section."""

import itertools
import math

from ..core import Schedule
from .sections import Superposition


def schedule_of(section: Superposition, total_steps: int) -> Schedule:
    """Return the schedule of a run; without superposition, all steps are recovery.

    Args:
        section: the section.
        total_steps: ``training.steps``.
    """
    if section.bag_size == 1:
        return Schedule()
    steps = steps_of_stages(section, total_steps)
    return Schedule.of(bag_sizes_of(section), steps, section.mode, section.scale)


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
