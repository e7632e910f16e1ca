"""Where tests run, and in which order; their fixtures are in common_fixtures.py.

With TorchTitan 0.3, the tests in titan03/ run, whose fixtures are in its conftest.py.
"""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

from selection import selects_gpu_tests

if not selects_gpu_tests(sys.argv[1:]):  # the other tests are of the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # datasets would ask the hub's server each time
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"

ON_03 = importlib.metadata.version("torchtitan").startswith("0.3.")
OF_03 = Path(__file__).parent / "titan03"

# These run first: each test takes a moment, so a mistake shows in seconds.
CHEAP = {"core", "checks", "test_train_configs.py", "test_selection.py"}
# Then these, so that no long test is left at the end, when others have nothing to do.
LONG = {"test_readme.py", "test_elastic.py", "test_parity.py"}


def pytest_configure(config: pytest.Config) -> None:
    """Import the fixtures, which takes seconds, but not where tests are only handed out."""
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out and not ON_03:
        config.pluginmanager.import_plugin("common_fixtures")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the tests of the other version of TorchTitan."""
    of_03 = OF_03 in (collection_path, *collection_path.parents)
    is_test = collection_path.is_file() or collection_path == OF_03
    return True if is_test and of_03 != ON_03 else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        names = {item.path.parent.name, item.path.name}
        return 0 if names & CHEAP else 1 if names & LONG else 2

    items.sort(key=place)
