"""``tst core copy``: core as a package of the user's, which needs torch only."""

import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from jobs import ROOT
from torchtitan.experiments.tst import shipped

CORE = ROOT / "torchtitan/experiments/tst/core"
MODULES = sorted(path.relative_to(CORE) for path in CORE.rglob("*.py"))
VERSION = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# Finds torch, what it requires, and the copy. There are no other packages.
ALONE = """
import sys

PACKAGES = {*sys.stdlib_module_names, "tst_core", "torch", "torchgen", "typing_extensions"}
PACKAGES |= {"sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock"}
PACKAGES |= {"plain_loop"}

class Only:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        top = name.partition(".")[0]
        known = top in PACKAGES or top.startswith("_sysconfigdata")
        return self.finder.find_spec(name, *args) if known else None

sys.meta_path = [Only(finder) for finder in sys.meta_path]
"""
STEP = """
import importlib.util, pkgutil
assert not importlib.util.find_spec("torchtitan") and not importlib.util.find_spec("numpy")
import torch
import tst_core
from tst_core import BagEmbedding, BagLoss, fold

names = [module.name for module in pkgutil.walk_packages(tst_core.__path__, "tst_core.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
model = torch.nn.Sequential(BagEmbedding(50, 8), torch.nn.Linear(8, 50))
stream = torch.randint(50, (2, 25))
inputs, labels = fold(stream[:, :-1], stream[:, 1:], 4)
loss = BagLoss("mce")(model(inputs), labels)
loss.backward()
assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())
print(len(names), loss.item())
"""


def run_alone(code, folder):
    """Run code in a folder, where torch and tst_core are the only packages."""
    command = [sys.executable, "-c", ALONE + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in all_files(folder)}


def all_files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_copy_is_the_package_byte_for_byte(tst, tmp_path):
    folder = tmp_path / "project" / "tst_core"
    result = tst("core", "copy", folder)
    assert result.code == 0, result.stderr
    assert result.stdout == (
        f"{len(MODULES)} modules of version {VERSION} are in {folder}, with LICENSE, ORIGIN.txt\n"
    )
    files = files_of(folder)
    origin = files.pop("ORIGIN.txt").decode()
    assert files.pop("LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert files == {str(path): (CORE / path).read_bytes() for path in MODULES}
    first = f"# Copied by `tst core copy` from core of torchtitan-tst {VERSION}."
    assert origin.splitlines()[0] == first
    before = files_of(folder)
    assert tst("core", "copy", folder).code == 0
    assert files_of(folder) == before


def test_the_copy_needs_torch_only(tst, tmp_path):
    assert tst("core", "copy", tmp_path / "tst_core").code == 0
    result = run_alone(STEP, tmp_path)
    assert result.returncode == 0, result.stderr
    count, loss = result.stdout.split()
    assert int(count) == len(MODULES) - 1  # the package itself
    assert 3 < float(loss) < 6


CONFORMANCE = """
import runpy

sys.argv = ["", "plain_loop_conformance.py"]
runpy.run_module("tst_core.conformance", run_name="__main__")
"""


def test_the_copy_checks_an_example_that_uses_it(tst, tmp_path):
    """The example has the import that its comment recommends."""
    assert tst("core", "copy", tmp_path / "tst_core").code == 0
    for name in ("plain_loop.py", "plain_loop_conformance.py"):
        text = (ROOT / "docs/examples" / name).read_text()
        (tmp_path / name).write_text(text.replace("torchtitan.experiments.tst.core", "tst_core"))
    result = run_alone(CONFORMANCE, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" checks pass.\n")


def test_the_checksums_show_what_has_changed(tst, tmp_path):
    assert tst("core", "copy", tmp_path).code == 0
    command = ["sha256sum", "--check", "--quiet", "ORIGIN.txt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "bags.py").write_text("# mine\n")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "bags.py: FAILED\n"


def test_a_changed_copy_is_not_overwritten(tst, tmp_path):
    assert tst("core", "copy", tmp_path).code == 0
    (tmp_path / "bags.py").write_text("# mine\n")
    (tmp_path / "head.py").unlink()
    before = files_of(tmp_path)
    result = tst("core", "copy", tmp_path)
    assert result.code == 2
    assert result.stderr == (
        f"error: {tmp_path / 'bags.py'} has changed since it was copied; copy to another folder, "
        "and move your changes there\n"
    )
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["bags.py", "LICENSE", "ORIGIN.txt"])
def test_a_file_of_another_origin_is_not_overwritten(tst, tmp_path, name):
    (tmp_path / name).write_text("mine\n")
    result = tst("core", "copy", tmp_path)
    assert result.code == 2
    error = f"{tmp_path / name} exists already and differs from the package's; give another folder"
    assert result.stderr == f"error: {error}\n"
    assert files_of(tmp_path) == {name: b"mine\n"}


def test_other_files_stay(tst, tmp_path):
    (tmp_path / "mine.py").write_text("mine\n")
    assert tst("core", "copy", tmp_path).code == 0
    assert (tmp_path / "mine.py").read_text() == "mine\n"


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """Return a function that makes another version of the repository the one in use."""

    def make(version, urls="", **modules):
        root = tmp_path / f"checkout-{version}"
        package = root / "torchtitan/experiments/tst"
        (package / "core" / "sub").mkdir(parents=True)
        for name, text in modules.items():
            (package / "core" / f"{name.replace('_in_', '/')}.py").write_text(text)
        (root / "LICENSE").write_text(f"Licence of {version}\n")
        (root / "pyproject.toml").write_text(
            f'[project]\nname = "torchtitan-tst"\nversion = "{version}"\n{urls}'
        )
        monkeypatch.setattr(shipped, "_PACKAGE", package)

    return make


def test_an_unchanged_copy_is_updated(tst, tmp_path, checkout):
    folder = tmp_path / "copy"
    checkout("1.0", kept="a = 1\n", same="b = 1\n", sub_in_gone="c = 1\n")
    assert tst("core", "copy", folder).code == 0
    assert files_of(folder).keys() == {
        *("kept.py", "same.py", "sub/gone.py", "LICENSE", "ORIGIN.txt")
    }
    checkout("1.1", kept="a = 2\n", same="b = 1\n", new="d = 1\n")
    result = tst("core", "copy", folder)
    assert result.code == 0, result.stderr
    files = files_of(folder)
    assert b" torchtitan-tst 1.1.\n" in files.pop("ORIGIN.txt")
    assert files == {
        "kept.py": b"a = 2\n",
        "same.py": b"b = 1\n",
        "new.py": b"d = 1\n",
        "LICENSE": b"Licence of 1.1\n",
    }


@pytest.mark.parametrize("name", ["kept.py", "sub/gone.py", "LICENSE"])
def test_an_update_keeps_a_changed_copy_as_it_is(tst, tmp_path, checkout, name):
    folder = tmp_path / "copy"
    checkout("1.0", kept="a = 1\n", sub_in_gone="c = 1\n")
    assert tst("core", "copy", folder).code == 0
    (folder / name).write_text("mine\n")
    before = files_of(folder)
    checkout("1.1", kept="a = 2\n")
    result = tst("core", "copy", folder)
    assert result.code == 2
    assert result.stderr.startswith(f"error: {folder / name} has changed since it was copied; ")
    assert files_of(folder) == before


@pytest.fixture
def fail_at(monkeypatch):
    """Return a function that lets the n-th call of a method of Path fail, once."""

    def patch(method, number):
        original, calls = getattr(Path, method), []

        def call(*args, **options):
            calls.append(args)
            if len(calls) == number:
                raise OSError(f"{method} failed")
            return original(*args, **options)

        monkeypatch.setattr(Path, method, call)

    return patch


OLD = {"kept": "a = 1\n", "same": "b = 1\n", "sub_in_gone": "c = 1\n"}
NEW = {"kept": "a = 2\n", "same": "b = 1\n", "empty": "", "new": "d = 1\n"}
NEWEST = {"kept": "a = 3\n", "same": "b = 1\n"}


@pytest.mark.parametrize("updated", [False, True])
def test_a_copy_that_does_not_fit_on_the_disk_changes_no_file(
    tst, tmp_path, checkout, fail_at, updated
):
    folder = tmp_path / "copy"
    if updated:
        checkout("1.0", **OLD)
        assert tst("core", "copy", folder).code == 0
    before = files_of(folder)
    checkout("1.1", **NEW)
    fail_at("write_text", 5)
    with pytest.raises(OSError, match="write_text failed"):
        shipped.copy_core(folder)
    assert files_of(folder) == before


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
@pytest.mark.parametrize(
    ("method", "number", "updated"),
    [("replace", n, updated) for n in range(1, 7) for updated in (False, True)]
    + [("unlink", 1, True)],
)
def test_an_interrupted_copy_is_completed_by_any_version(
    tmp_path, checkout, fail_at, monkeypatch, method, number, updated, version
):
    folder, modules = tmp_path / "copy", {"1.0": OLD, "1.1": NEW, "1.2": NEWEST}
    for name in modules:
        checkout(name, **modules[name])

    def copy(name):
        package = tmp_path / f"checkout-{name}/torchtitan/experiments/tst"
        monkeypatch.setattr(shipped, "_PACKAGE", package)
        shipped.copy_core(folder)

    if updated:
        copy("1.0")
    fail_at(method, number)
    with pytest.raises(OSError, match=f"{method} failed"):
        copy("1.1")
    copy(version)
    files = files_of(folder)
    assert files.pop("ORIGIN.txt").startswith(b"# Copied by ")
    expected = {f"{name.replace('_in_', '/')}.py": text for name, text in modules[version].items()}
    expected["LICENSE"] = f"Licence of {version}\n"
    assert files == {name: text.encode() for name, text in expected.items()}


def test_equal_files_are_not_written(tst, tmp_path, checkout):
    checkout("1.0", **OLD)
    assert tst("core", "copy", tmp_path / "copy").code == 0
    before = {path: path.stat().st_ino for path in all_files(tmp_path / "copy")}
    assert tst("core", "copy", tmp_path / "copy").code == 0
    assert {path: path.stat().st_ino for path in before} == before


@pytest.mark.parametrize("name", ["bags.py", "ORIGIN.txt"])
def test_a_symbolic_link_is_not_followed(tst, tmp_path, name):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / name).symlink_to(tmp_path / "outside")
    result = tst("core", "copy", tmp_path / "copy")
    assert result.code == 2
    error = f"{tmp_path / 'copy' / name} is a symbolic link; remove it, or give another folder"
    assert result.stderr == f"error: {error}\n"
    assert not (tmp_path / "outside").exists()


def test_line_ends_of_another_system_are_no_change(tst, tmp_path, checkout):
    folder = tmp_path / "copy"
    checkout("1.0", kept="a = 1\nb = 1\n")
    assert tst("core", "copy", folder).code == 0
    for path in all_files(folder):
        path.write_text(path.read_text(), newline="\r\n")
    checkout("1.1", kept="a = 2\nb = 1\n")
    assert tst("core", "copy", folder).code == 0
    assert (folder / "kept.py").read_text() == "a = 2\nb = 1\n"


def test_the_urls_of_the_project_are_in_the_origin(tst, tmp_path, checkout):
    checkout("1.0", '[project.urls]\nRepository = "https://example.org/tst"\n', kept="a = 1\n")
    assert tst("core", "copy", tmp_path / "copy").code == 0
    origin = (tmp_path / "copy/ORIGIN.txt").read_text()
    assert "\n# Repository, https://example.org/tst\n" in origin


@pytest.mark.parametrize("pyproject", [None, '[project]\nname = "torchtitan"\nversion = "0.2.2"\n'])
def test_a_copy_of_the_package_without_a_licence_says_so(tst, monkeypatch, tmp_path, pyproject):
    """As after a copy into TorchTitan's source."""
    if pyproject:
        (tmp_path / "pyproject.toml").write_text(pyproject)
        (tmp_path / "LICENSE").write_text("of TorchTitan\n")
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "torchtitan/experiments/tst")
    monkeypatch.setattr(shipped, "_DISTRIBUTION", "no-such-distribution")
    result = tst("core", "copy", tmp_path / "copy")
    assert result.code == 2 and "has no licence; install it with `pip install" in result.stderr
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["tst-core", "import"])
def test_the_name_must_be_a_python_name(tst, tmp_path, name):
    result = tst("core", "copy", tmp_path / name)
    assert result.code == 2
    assert f"FOLDER {tmp_path / name}: {name} must be a Python name" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["file", "file/tst_core", "link"])
@pytest.mark.parametrize("command", ["core", "configs"])
def test_the_folder_must_be_one(tst, tmp_path, command, folder):
    (tmp_path / "file").write_text("mine\n")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    result = tst(command, "copy", tmp_path / folder)
    assert result.code == 2
    place = tmp_path / folder.partition("/")[0]
    error = f"FOLDER {tmp_path / folder}: {place} is not a folder; give another FOLDER"
    assert result.stderr == f"error: {error}\n"
