"""Fixtures for TorchTitan 0.3: a small corpus, and the Python that has TorchTitan 0.2.2.

Small jobs, and how to train them in this process, are in jobs_of_03.py.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
PYTHON_02 = os.environ.get("TST_PYTHON_02", str(ROOT / ".venv/bin/python"))


def pytest_configure(config: pytest.Config) -> None:
    """Import TorchTitan, which takes seconds, but not where tests are only handed out."""
    if not config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        import torch

        from torchtitan.experiments.tst.titan03.cpu import enable_cpu_if_alone

        enable_cpu_if_alone()
        torch.set_num_threads(1)  # with more, two runs of the same experts may differ in a bit


def run_on_02(script: str, *arguments: object) -> str:
    """Run a script of this folder with TorchTitan 0.2.2; returns what it prints."""
    result = subprocess.run(
        [PYTHON_02, str(Path(__file__).with_name(script)), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result.stdout


@pytest.fixture(scope="session")
def on_02() -> Callable[..., str]:
    """Run a script of this folder with TorchTitan 0.2.2."""
    return run_on_02


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with train.jsonl, validation.jsonl, tokenizer/, text/ and token shards in tokens/.

    TorchTitan 0.2.2 makes it, once for all processes of a run of pytest.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "corpus"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            run_on_02("corpus_of_02.py", folder)
    return folder
