"""The package's folders form layers: import-linter's contracts in pyproject.toml."""

import ast
import os
import subprocess
import sys

import grimp
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
        ("commands/running.py", "from ..titan03 import start"),
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


# With their parts, these need nothing of TorchTitan, or only what 0.2.2 and 0.3 both have.
SHARED_WITH_03 = [
    "core",
    "engine",
    "errors",
    "expert_metrics",
    "file_checks",
    "launch",
    "metrics_file",
    "checks.loading",
    "checks.ranks",
    "checks.superposition",
    "config.allowed",
    "config.command_line",
    "config.job_file",
    "config.layout",
    "config.old_keys",
    "config.sections",
    "config.stages",
    "config.upstream_ranges",
    "config.values",
    "data.demo_corpus",
    "data.errors",
    "data.tokenizer_identity",
    "data.workers",
    "data.shards.mixture",
    "data.shards.token_shards",
    "data.shards.tokenization_options",
    "data.shards.windows",
    "data.text.datasets",
    "data.text.files",
    "data.text.records",
    "planning.numbers",
    "resilience.reporting",
    "resilience.stop",
    "upstream.autograd",
    "upstream.on_cpu",
    "upstream.replaced",
]
# within a function that only 0.2.2 calls
ONLY_02 = {("tst.data.demo_corpus", "tst.data.shards.executors")}


def test_the_code_for_03_imports_only_what_both_versions_share(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "torchtitan/experiments")
    graph = grimp.build_graph("tst", exclude_type_checking_imports=True, cache_dir=None)

    def is_shared(module: str) -> bool:
        return any(f"{module}.".startswith(f"tst.{name}.") for name in ("titan03", *SHARED_WITH_03))

    found = {
        (module, imported)
        for module in filter(is_shared, graph.modules)
        for imported in graph.find_modules_directly_imported_by(module)
        if not is_shared(imported)
    }
    assert found == ONLY_02
    assert {f"tst.{name}" for name in SHARED_WITH_03} <= graph.modules


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
