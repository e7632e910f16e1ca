"""A job for commands that start or check one."""

import pytest


@pytest.fixture
def job(tmp_path):
    """A TOML that says nothing; the small job is its arguments."""
    path = tmp_path / "job.toml"
    path.touch()
    return path
