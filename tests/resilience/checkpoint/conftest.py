"""Fixtures: checkpoints of a run that has ended, in the folder of a job to come."""

import shutil

import pytest


def copier(run, tmp_path):
    def make(*steps):
        folder = tmp_path / "run" / "checkpoint"
        for step in steps:
            shutil.copytree(run.checkpoints / f"step-{step}", folder / f"step-{step}")
        return folder

    return make


@pytest.fixture
def run_folder(whole, tmp_path):
    """Puts some of the run's checkpoints into the folder of the job to come."""
    return copier(whole, tmp_path)


@pytest.fixture
def staged_folder(staged, tmp_path):
    """As ``run_folder``, of a run in stages."""
    return copier(staged, tmp_path)


@pytest.fixture
def warnings(caplog):
    def of_this_package():
        return "\n".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")

    return of_this_package
