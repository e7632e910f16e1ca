"""The record of a run's bags in its run folder, so that a resume with other bags is noticed."""

import json
from pathlib import Path
from typing import Any

from ..core import Schedule
from ..errors import ConfigTextError

RECORD_FILE = "superposition.json"


def write_record(folder: Path, schedule: Schedule) -> None:
    """Write the schedule of a run to its folder.

    Args:
        folder: run folder.
        schedule: phase and bag size of each step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{RECORD_FILE}.unfinished"
    unfinished.write_text(json.dumps(_facts(schedule, schedule.boundary)))
    unfinished.replace(folder / RECORD_FILE)


def check_record(folder: Path, schedule: Schedule, step: int) -> None:
    """Check that a run resumes with the bags that its steps had.

    Args:
        folder: run folder; without a record, nothing is checked.
        schedule: phase and bag size of each step, from the config.
        step: the step of the checkpoint.

    Raises:
        ConfigTextError: if they differ; names both.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return
    recorded = json.loads(path.read_text())
    stages = [stage for stage in recorded["stages"] if stage["first"] <= step]
    for stage in stages:
        stage["last"] = min(stage["last"], step)
    before, now = recorded | {"stages": stages}, _facts(schedule, step)
    if before != now:
        raise ConfigTextError(
            f"the config contradicts the checkpoint of step {step}: its steps had "
            f"{_in_words(before)}, and [superposition] has {_in_words(now)} ({path}). Restore the "
            "section, or give the run another dump folder"
        )


def _facts(schedule: Schedule, steps: int) -> dict[str, Any]:
    """Return the superposition of the first ``steps`` steps, as plain values."""
    stages = [
        {"bag_size": stage.bag_size, "first": stage.first, "last": stage.last}
        for stage in schedule.until(steps)
        if stage.bag_size > 1
    ]
    return {"mode": schedule.mode, "scale": schedule.scale, "stages": stages}


def _in_words(facts: dict[str, Any]) -> str:
    stages = [
        f"bags of {stage['bag_size']} in steps {stage['first']} to {stage['last']}"
        for stage in facts["stages"]
    ]
    return f"{', '.join(stages) or 'no bags'} (mode {facts['mode']}, scale {facts['scale']})"
