"""Fixtures: checkpoints of a run that has ended, in the folder of a job to come."""

import shutil

import pytest


@pytest.fixture
def run_folder(whole, tmp_path):
    """Puts some of the run's checkpoints into the folder of the job to come."""

    def make(*steps):
        folder = tmp_path / "run" / "checkpoint"
        for step in steps:
            shutil.copytree(whole.checkpoints / f"step-{step}", folder / f"step-{step}")
        return folder

    return make


@pytest.fixture
def warnings(caplog):
    def of_this_package():
        return "\n".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")

    return of_this_package
