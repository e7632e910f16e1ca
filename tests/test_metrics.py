import json
from pathlib import Path

import pytest

from torchtitan.experiments.tst.core import Schedule
from torchtitan.experiments.tst.metrics import (
    TRAINING_LOSS,
    VALIDATION_LOSS,
    JsonLinesLogger,
    read_metrics,
)


def test_lines_that_a_later_launch_went_back_behind_are_left_out(tmp_path):
    def write(*steps, loss):
        log = JsonLinesLogger(tmp_path / "metrics.jsonl", Schedule(bag_size=4, boundary=2))
        for step in steps:
            log.log({TRAINING_LOSS: loss}, step)
        log.log({VALIDATION_LOSS: loss}, steps[-1])
        log.close()

    write(1, 2, 3, loss=0.0)
    write(3, 4, loss=1.0)  # resumed from step 2
    lines = read_metrics(tmp_path)
    losses = [(line["step"], line.get(TRAINING_LOSS)) for line in lines]
    assert losses == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (4, None)]
    assert [line["phase"] for line in lines[:3]] == ["superposition"] * 2 + ["recovery"]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)


def test_validations_that_a_later_launch_went_back_behind_are_left_out(tmp_path):
    log = JsonLinesLogger(tmp_path / "metrics.jsonl", Schedule())
    for launch, steps in enumerate(([1, 4, 8, 12], [6, 8, 12, 16])):
        for step in steps:
            if step in (1, 16):
                log.log({TRAINING_LOSS: 0.0}, step)
            log.log({VALIDATION_LOSS: float(launch)}, step)
    log.close()
    validated = [line for line in read_metrics(tmp_path) if VALIDATION_LOSS in line]
    losses = [(line["step"], line[VALIDATION_LOSS]) for line in validated]
    assert losses == [(1, 0.0), (4, 0.0), (6, 1.0), (8, 1.0), (12, 1.0), (16, 1.0)]


def test_a_line_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss_metrics/global_avg_loss": 0.0}\n{"step": 2, "loss_met')
    log = JsonLinesLogger(path, Schedule())
    log.log({TRAINING_LOSS: 1.0}, 2)
    log.close()
    lines = [(line["step"], line[TRAINING_LOSS]) for line in read_metrics(tmp_path)]
    assert lines == [(1, 0.0), (2, 1.0)]


def test_a_full_disk_names_the_file():
    log = JsonLinesLogger(Path("/dev/full"), Schedule())
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        log.log({TRAINING_LOSS: 1.0}, 1)
