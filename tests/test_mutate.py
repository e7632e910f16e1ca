"""``scripts/mutate.py`` finds out whether a test catches a fault."""

import json
import textwrap

import pytest

import mutate
from jobs import ROOT


def test_every_fault_fits_the_package():
    faults = mutate.read_faults(mutate.FAULTS)
    assert len(faults) >= 40
    assert len({fault.name for fault in faults}) == len(faults)
    (fault,) = mutate.read_faults(mutate.FAULTS, ["boundary is the first"])
    assert mutate.first_tests(fault, ROOT / "tests") == [str(ROOT / "tests/core/test_schedule.py")]


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """Three faults of one module: its tests catch the first, and hang with the last."""
    package = tmp_path / "repository" / mutate.PACKAGE
    package.mkdir(parents=True)
    package.joinpath("__init__.py").touch()
    package.joinpath("sums.py").write_text("def add(a, b):\n    return a + b\n\nUNUSED = 0\n")
    tests = tmp_path / "repository" / "tests"
    tests.mkdir()
    tests.joinpath("test_other.py").write_text(
        textwrap.dedent("""
        import sys
        import time
        import types

        for name in ("torchtitan", "torchtitan.experiments"):  # upstream's take seconds
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = []

        from torchtitan.experiments.tst import sums

        def test_add():
            assert sums.add(1, 2) == 3

        def test_that_hangs():
            time.sleep(60 * sums.UNUSED)
        """)
    )
    path = tests / "faults.toml"
    path.write_text(
        textwrap.dedent("""
        [[fault]]
        name = "the sign"
        file = "sums.py"
        find = "a + b"
        replace = "a - b"

        [[fault]]
        name = "what nobody uses"
        file = "sums.py"
        find = "UNUSED = 0"
        replace = "UNUSED = -0"

        [[fault]]
        name = "a hang"
        file = "sums.py"
        find = "UNUSED = 0"
        replace = "UNUSED = 1"
        """)
    )
    monkeypatch.setattr(mutate, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(mutate, "FAULTS", path)
    mutate.subprocess.run(["git", "init", "-q", tmp_path / "repository"], check=True)
    return path


def test_a_fault_is_caught_or_survives(faults, run_script, tmp_path):
    before = (faults.parent.parent / mutate.PACKAGE / "sums.py").read_text()
    result = run_script("mutate", "--only", "sign", "nobody", "--output", tmp_path / "faults.json")
    assert result.code == 1
    assert "tests/test_other.py::test_add" in result.stdout
    assert "2/2  sums.py: what nobody uses" in result.stdout
    assert "SURVIVES\n1 of 2 faults are caught" in result.stdout
    first, second = json.loads((tmp_path / "faults.json").read_text())
    assert first["fault"]["name"] == "the sign" and first["caught_by"]
    assert not second["caught_by"]
    assert (faults.parent.parent / mutate.PACKAGE / "sums.py").read_text() == before


def test_a_hang_is_not_taken_for_a_failure(faults, run_script, tmp_path):
    output = ("--output", tmp_path / "faults.json")
    result = run_script("mutate", "--only", "hang", "--limit", 3, *output)
    assert result.code == 1
    assert "NOT KNOWN: the tests did not end in time\n0 of 1 faults are caught" in result.stdout
    (outcome,) = json.loads((tmp_path / "faults.json").read_text())
    assert outcome["not_known"] and not outcome["caught_by"]


def test_tests_that_are_not_there(faults, run_script):
    faults.write_text(faults.read_text() + 'first = ["tests/test_none.py"]\n')
    result = run_script("mutate", "--only", "hang")
    assert result.code == 1
    assert "NOT KNOWN: ['tests/test_none.py'] selects no tests: " in result.stdout


def test_a_fault_that_does_not_fit(faults, run_script):
    faults.write_text(faults.read_text().replace("a + b", "a * b"))
    result = run_script("mutate")
    assert result.code == 2
    assert "'the sign': sums.py has `find` 0 times" in result.stderr
