"""The package's folders form layers: import-linter's contracts in pyproject.toml."""

import ast
import os
import subprocess
import sys

import pytest

from jobs import ROOT

LINT = (
    "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
)


def lint(folder) -> subprocess.CompletedProcess:
    """Check the package of a checkout, found as ``tst`` of its own folder."""
    path = folder / "torchtitan/experiments"
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )


def test_imports_point_down():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core/bags.py", "from ..config import layout"),
        ("resilience/stop.py", "from ..training import reinit"),
        ("data/text/records.py", "from ..shards import mixture"),
        ("unlisted/__init__.py", ""),
    ],
)
def test_an_import_that_points_up_is_noticed(tmp_path, module, line):
    package = "torchtitan/experiments/tst"
    for path in (ROOT / package).rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    changed = tmp_path / package / module
    changed.parent.mkdir(exist_ok=True)
    changed.write_text((changed.read_text() if changed.exists() else "") + f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stdout


CODE = sorted(
    path
    for folder in ("torchtitan", "scripts", "docs/examples")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (40 if node.name == "__init__" else 60), node.name


def test_the_package_replaces_nothing_by_a_library_of_tests():
    for path in (ROOT / "torchtitan").rglob("*.py"):
        assert "unittest" not in path.read_text(), path
