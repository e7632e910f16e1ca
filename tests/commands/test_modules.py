"""What a module of a command may contain, and what its help and the package's messages name."""

import ast
import functools
import re
import shlex
from itertools import chain

import pytest

from jobs import ROOT
from torchtitan.experiments.tst import commands
from torchtitan.experiments.tst.commands import running
from torchtitan.experiments.tst.shipped import shipped_configs

PACKAGE = ROOT / "torchtitan/experiments/tst"
NAMES = sorted(chain(*commands.COMMANDS.values()))
MODULES = {name: PACKAGE / "commands" / f"{name.replace('-', '_')}.py" for name in NAMES}
SHARED = {"__init__", "arguments", "harness_options", "running"}
WRITES = {"open", "write_text", "write_bytes", "mkdir", "unlink", "rename", "rmtree", "copy", "run"}
HEAVY = {"torch", "numpy", "torchtitan", "datatrove", "transformers", "lm_eval", "matplotlib"}


def tree_of(path):
    return ast.parse(path.read_text())


def names_of(nodes, kind):
    return [node.name for node in nodes if isinstance(node, kind)]


def test_every_command_is_a_module_and_every_module_a_command():
    found = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - SHARED
    assert found == {path.stem for path in MODULES.values()}


@pytest.mark.parametrize("name", NAMES)
def test_a_command_parses_and_prints(name):
    tree = tree_of(MODULES[name])
    functions = names_of(tree.body, ast.FunctionDef)
    assert [f for f in functions if not f.startswith("_")] == ["main"]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):  # options: fields alone
            fields = [part for part in node.body if not isinstance(part, ast.Expr)]
            assert all(isinstance(field, ast.AnnAssign) for field in fields), node.name
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in imported:
        modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [] if node.level else [str(node.module)]
        assert not HEAVY & {module.partition(".")[0] for module in modules}, ast.unparse(node)
    called = {
        getattr(call.func, "attr", getattr(call.func, "id", ""))
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
    }
    assert not called & WRITES
    assert len(MODULES[name].read_text().splitlines()) < 100


def test_the_library_does_not_know_the_commands():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "commands" or path.name == "__main__.py":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(alias.name for alias in node.names)]
                assert "commands" not in ".".join(names).split("."), path


def examples_of(name):
    return re.findall(rf"^    tst {name} (.+)$", running._module(name).__doc__, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_help(tst, name):
    result = tst(name, "--help")
    purpose = ast.get_docstring(tree_of(MODULES[name])).partition("\n")[0]
    assert result.code == 0 and purpose.endswith(".") and len(purpose) < 90
    assert purpose in result.stdout
    assert examples_of(name) and all(example in result.stdout for example in examples_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_the_help_are_understood(monkeypatch, name):
    module, calls = running._module(name), []

    @functools.wraps(module.main)  # whose parameters tyro reads
    def recorded(*args, **kwargs):
        calls.append(args)

    monkeypatch.setattr(module, "main", recorded)
    for example in examples_of(name):
        running.run(name, shlex.split(example))
    assert len(calls) == len(examples_of(name))


def test_overview_has_every_command(tst):
    result = tst("--help")
    assert result.code == 0
    for name in NAMES:
        purpose = ast.get_docstring(tree_of(MODULES[name])).partition("\n")[0]
        assert re.search(rf"^  {name} +{re.escape(purpose)}$", result.stdout, re.MULTILINE)
    assert tst() == result


def strings_of(path):
    return [n.value for n in ast.walk(tree_of(path)) if isinstance(getattr(n, "value", 0), str)]


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if "train_configs" not in path.parts)


# In planning/sweep.py, which asks whether it is there before a message names it
ASKED_FOR = {"scripts/slurm/train.sbatch", "train.sbatch"}
YOURS = {"conformance_of_my_loop.py"}  # of the user


def test_messages_name_no_file_that_pip_users_lack():
    shipped = {f"train_configs/{path}" for path, _ in shipped_configs()}
    for path in modules():
        for text in strings_of(path):
            files = re.findall(
                r"\b(?:scripts|docs|tests)/[\w./-]*|\b[\w.]+\.(?:sbatch|sh|md|py)\b", text
            )
            files += re.findall(r"train_configs/[\w./-]+\.toml", text)
            assert set(files) <= shipped | ASKED_FOR | YOURS, (path, text)


def test_messages_name_commands_and_options_that_are_there(tst):
    options = {name: set(re.findall(r"--[\w-]+", tst(name, "--help").stdout)) for name in NAMES}
    named = 0
    for path in modules():
        for text in strings_of(path):
            for command in re.findall(r"`tst ([^`]+)`|(?<!-)\btst ([a-z-]+) (?:--|[A-Z])", text):
                name, *words = "".join(command).split()
                assert name in NAMES, (path, text)
                given = {word.partition("=")[0] for word in words if re.match(r"--[a-z-]+$", word)}
                assert given <= options[name], (path, text)
                named += 1
    assert named >= 10
