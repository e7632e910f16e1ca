"""The metrics of a run: their names, and ``metrics.jsonl``, which has a line for each log."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from torchtitan.components.metrics import BaseLogger
from torchtitan.tools.logging import logger
from typing_extensions import override

from .core import Schedule

METRICS_FILE = "metrics.jsonl"
# Upstream's keys of the two losses.
TRAINING_LOSS, VALIDATION_LOSS = "loss_metrics/global_avg_loss", "validation_metrics/loss"
SECONDS_PER_STEP = "time_metrics/end_to_end(s)"
DATA_TOKENS, LATENTS = "n_tokens_seen", "n_latents_seen"


class JsonLinesLogger(BaseLogger):
    """Writes a JSON object on each line: ``step``, ``phase`` and the metrics of one call.

    A resumed run appends to the file. :func:`read_metrics` skips the lines of steps that were
    repeated.
    """

    def __init__(self, path: Path, schedule: Schedule):
        self.schedule = schedule
        self.file = open_lines(path)

    @override
    def log(self, metrics: dict[str, Any], step: int) -> None:
        line = {"step": step, "phase": str(self.schedule.phase(step)), **metrics}
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:  # such as a full disk; the error does not name the file
            raise OSError(error.errno, error.strerror, self.file.name) from error

    @override
    def close(self) -> None:
        self.file.close()


def open_lines(path: Path) -> TextIO:
    """Open a file of JSON lines to append to it, and end its last line if a kill cut it short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", buffering=1)
    if size := file.tell():
        file.seek(size - 1)
        if file.read(1) != "\n":
            file.write("\n")
    return file


def read_metrics(run_folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the lines of a run's ``metrics.jsonl``; steps that were repeated are read once.

    If a later launch repeated steps, its lines replace those of the earlier launch.
    """
    lines: list[dict[str, Any]] = []
    last = (0, False)  # step, and whether the line is a validation's, which comes after training
    with Path(run_folder, METRICS_FILE).open() as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # an incomplete line of a killed run
            place = (line["step"], VALIDATION_LOSS in line)
            if place <= last:
                lines = [kept for kept in lines if kept["step"] < line["step"]]
            lines.append(line)
            last = place
    return lines


@contextmanager
def appended_to_step_line(suffix: str) -> Iterator[None]:
    """Append to the line that upstream logs for a step; upstream has no hook for this."""

    def append(record: logging.LogRecord) -> bool:
        if isinstance(record.msg, str) and "step: " in record.msg:
            record.msg += suffix
        return True

    logger.addFilter(append)
    try:
        yield
    finally:
        logger.removeFilter(append)
