"""The tables in ``upstream/README.md``: every name is there, and no other is used."""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from private_names import PACKAGE, README, ROW, TABLE, of_engine, resolve

UPSTREAM = ("torch", "torchtitan", "torchdata")
# private names of other packages, and of Python
OTHERS = {"_replace", "_exit", "_strip_protocol"}


def is_of(version: str, name: str) -> bool:
    """Whether a version of torch has a name, according to the table."""
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    limits = dict(re.findall(r"\b(from|before) (\d+\.\d+)", row.partition("with torch ")[2]))
    found = TorchVersion(version)
    return limits.get("from", "0") <= found < limits.get("before", "99")


@pytest.mark.parametrize("name", of_engine("0.2"))
def test_a_name_in_the_table_exists(name):
    if not is_of(torch.__version__, name):
        pytest.skip("the table says that it is of another torch")
    resolve(name)


def test_the_table_names_versions_of_torch():
    stage = "torch.distributed.pipelining.PipelineStage"
    versions = ["2.11.0", "2.13.0+cpu", "2.14.1", "2.15.0"]
    for name, expected in (
        (f"{stage}._validate_fwd_input", [True, False, False, False]),
        (f"{stage}._warmup_forward_vote", [False, True, True, False]),
        (f"{stage}._forward_chunk_states", [False, False, False, True]),
        ("torch._utils", [True, True, True, True]),
    ):
        assert [is_of(version, name) for version in versions] == expected


@pytest.mark.parametrize(
    "name", ["torch.no_such._name", "torch._no_such_module.name", "torch.optim.Adam._no_such_name"]
)
def test_a_name_that_is_gone_is_noticed(name):
    with pytest.raises((AssertionError, AttributeError)):
        resolve(name)


def is_private(name: str) -> bool:
    return any(re.match(r"_[^_]", part) for part in name.split("."))


def imports_of(tree: ast.Module) -> dict[str, str]:
    """Upstream's full name of what is imported, by its name in the module."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
    return {name: full for name, full in found.items() if full.split(".")[0] in UPSTREAM}


def full_name(node: ast.expr, imported: dict[str, str]) -> str:
    """The full name of a chain of attributes; "" if it does not begin with an import."""
    first, _, rest = ast.unparse(node).partition(".")
    return ".".join(filter(None, [imported[first], rest])) if first in imported else ""


def private_names(path: Path) -> set[str]:
    """Names of upstream's that a module uses; of objects, the attribute with a dot before it."""
    tree = ast.parse(path.read_text())
    imported = imports_of(tree)
    found = {full for full in imported.values() if is_private(full)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            owner = ast.unparse(node.value)
            if full := full_name(node, imported):
                found.add(full)
            elif owner not in ("self", "cls", "super()") and node.attr not in OTHERS:
                found.add(f".{node.attr}")
        if isinstance(node, ast.ClassDef):
            bases = [full for base in node.bases if (full := full_name(base, imported))]
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and re.match(r"_[^_]", method.name):
                    overrides = any("override" in ast.unparse(d) for d in method.decorator_list)
                    found |= {f"{base}.{method.name}" for base in bases if overrides}
    return found


@functools.cache
def own_attributes() -> set[str]:
    """Private names that the package itself defines, and so may use."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(f".{node.name}")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(f".{node.id}")
    return found


MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_private_names_are_in_the_table(module):
    own = own_attributes()
    for name in private_names(PACKAGE / module) - own:
        rows = [row for row in TABLE if row == name or row.endswith(f".{name.rpartition('.')[2]}")]
        assert rows, f"{module} uses {name}, which upstream/README.md does not list"
        assert any(module in TABLE[row] for row in rows), f"{name}: not of {module}"


def test_files_in_the_table_use_the_names():
    for name, files in TABLE.items():
        for file in files:
            assert name.rpartition(".")[2] in (PACKAGE / file).read_text(), (name, file)


def test_private_names_are_used_in_this_folder_only():
    """Except overridden methods, core, which imports nothing of ours, and the code for 0.3."""
    heading = None
    for line in README.splitlines():
        heading = line.removeprefix("## ") if line.startswith("## ") else heading
        if (row := ROW.match(line)) and is_private(row[1]) and "Overridden" not in heading:
            folders = {Path(file).parts[0] for file in TABLE[row[1]]}
            assert folders <= {"upstream", "core", "titan03"}, row[1]
