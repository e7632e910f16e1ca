"""Ours is installed beside upstream's package and found inside it."""

import configparser
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomli

from jobs import ROOT

PACKAGE = "torchtitan/experiments/tst"
FIGURES = ("runs.json", "loss_270m_20k.csv", "loss_600m_20k_power_law.csv")


def modules() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).rglob("*.py")}


def job_configs() -> set[str]:
    """Those of the wheel: not replication.toml, which is of scripts/replicate.py."""
    folders = (ROOT / "train_configs" / name for name in ("demo", "debug", "paper"))
    return {str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.toml")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("wheel") / "source"  # building leaves files behind
    for name in ("torchtitan", "train_configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    folder = source.parent
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("torchtitan_tst-*.whl")
    return zipfile.ZipFile(wheel)


def test_each_package_is_listed_once():
    packages = tomli.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert packages == sorted({*packages})


def test_the_wheel_holds_our_modules_and_nothing_of_upstreams(wheel):
    content = set(wheel.namelist())
    names = {name for name in content if name.endswith(".py")}
    assert names == modules()
    assert {f"{PACKAGE}/paper/{name}" for name in FIGURES} <= content
    # with these, ours would hide the installed upstream package
    assert not names & {"torchtitan/__init__.py", "torchtitan/experiments/__init__.py"}


def test_the_wheel_holds_the_job_configs_and_finds_them(wheel, tmp_path):
    configs = job_configs()
    assert len(configs) > 25
    assert {name for name in wheel.namelist() if name.endswith(".toml")} == {
        f"{PACKAGE}/{name}" for name in configs
    }
    wheel.extractall(tmp_path)
    installed = runpy.run_path(str(tmp_path / PACKAGE / "shipped.py"))
    found = {f"train_configs/{path}" for path, _ in installed["shipped_configs"]()}
    assert found == configs


def test_core_is_copied_from_the_wheel_with_its_licence(wheel, tmp_path, monkeypatch):
    wheel.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")  # where its metadata is
    installed = runpy.run_path(str(tmp_path / "site" / PACKAGE / "shipped.py"))
    version, copies = installed["copy_core"](tmp_path / "copy")
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    assert f"Version: {version}" in wheel.read(name).decode().splitlines()
    core = f"{PACKAGE}/core"
    assert {f"{core}/{path.relative_to(tmp_path / 'copy')}" for path in copies} == {
        name for name in modules() if name.startswith(f"{core}/")
    }
    assert (tmp_path / "copy/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_has_the_command_tst(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(wheel.read(name).decode())
    assert dict(points["console_scripts"]) == {"tst": "torchtitan.experiments.tst.__main__:main"}


OURS = "experiments/tst/__init__.py"
BOTH = ["__init__.py", "experiments/__init__.py", OURS]


@pytest.mark.parametrize(
    ("files", "release", "extra", "used"),
    [
        (BOTH, "0.2.2", "demo", True),
        (BOTH[:2], "0.2.2", "demo", False),
        ([OURS], "0.2.2", "demo", False),
        (BOTH, "0.3.0", "demo", False),
        (BOTH, "0.3.0", "titan03-dev", True),
        (BOTH, "0.2.2", "titan03-dev", False),
    ],
    ids=["both", "TorchTitan alone", "a checkout of ours alone", "0.3", "0.3 for 0.3", "for 0.3"],
)
def test_an_active_environment_is_used_if_it_has_the_package(tmp_path, files, release, extra, used):
    for name in files:
        path = tmp_path / "site" / "torchtitan" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    metadata = tmp_path / "site" / f"torchtitan-{release}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: torchtitan\nVersion: {release}\n")
    python = tmp_path / "active" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    venv, stamp = (".venv", "dev") if extra == "demo" else (".venv-titan03", extra)
    stamp = tmp_path / "checkout" / venv / f".installed-{stamp}"  # nothing is installed here
    stamp.parent.mkdir(parents=True)
    stamp.touch()
    pyproject = tmp_path / "checkout" / "pyproject.toml"
    pyproject.touch()
    os.utime(pyproject, (0, 0))
    variables = {"VIRTUAL_ENV": "active", "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        ["bash", "-euc", f'. {ROOT}/scripts/venv.sh {extra}; echo "$PATH"'],
        cwd=tmp_path / "checkout",
        env=os.environ | variables | {"PATH": f"{python.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    first = Path(result.stdout.split(":")[0])
    assert first == (python.parent if used else tmp_path / "checkout" / venv / "bin")


@pytest.mark.parametrize(("extra", "oldest"), [("dev", 10), ("titan03-dev", 11)])
def test_no_environment_is_created_by_an_old_python(tmp_path, extra, oldest):
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport sys; sys.version_info = (3, {oldest - 1})\n"
        "assert sys.argv[1] == '-c'; exec(sys.argv[2])\n"
    )
    python.chmod(0o755)
    (tmp_path / "pyproject.toml").touch()
    result = subprocess.run(
        ["bash", "-euc", f". {ROOT}/scripts/venv.sh {extra}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": str(python), "VIRTUAL_ENV": "", "CONDA_PREFIX": ""},
        capture_output=True,
        text=True,
    )
    venv = ".venv" if extra == "dev" else ".venv-titan03"
    assert result.returncode == 1
    assert result.stderr == (
        f"PYTHON = {python}: {venv} needs Python 3.{oldest} or later; set PYTHON to one\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "0.4"], "--engine 0.4: must be 0.2 or 0.3\n"),
        (["-k", "a", "--engine"], "--engine without a value: must be 0.2 or 0.3\n"),
        (["tests/titan03"], "tests/titan03 needs TorchTitan 0.3: add --engine 0.3\n"),
    ],
)
def test_arguments_that_the_script_of_tests_refuses(arguments, message):
    command = [ROOT / "scripts/test.sh", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, message)


def test_an_extra_names_each_version_of_torchtitan():
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert (extras["titan02"], extras["titan03"]) == (["torchtitan==0.2.2"], ["torchtitan==0.3.0"])

    def version(extra: str) -> str:
        """The extra with TorchTitan that an extra includes."""
        if extra in ("titan02", "titan03"):
            return extra
        parts = [part for part in extras[extra] if part.startswith("torchtitan-tst[")]
        names = {name for part in parts for name in part[15:-1].split(",")}
        return "".join({version(name) for name in names})

    assert {extra: version(extra) for extra in extras if version(extra)} == {
        **dict.fromkeys(("titan02", "data", "demo", "eval", "dev"), "titan02"),
        **dict.fromkeys(("titan03", "titan03-dev"), "titan03"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("editable", [[], ["--editable"]], ids=["ordinary", "editable"])
def test_install_on_a_fresh_machine(tmp_path, editable):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", *editable, f"{ROOT}[titan02]"], check=True
    )
    code = "import torchtitan.train, torchtitan.experiments.tst.train as ours; print(ours.__file__)"
    result = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith(str(ROOT if editable else tmp_path))
    command = [python.with_name("tst"), "configs", "copy", tmp_path]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    copies = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("train_configs/**/*.toml")}
    assert copies == job_configs()
    command = [python.with_name("tst"), "core", "copy", tmp_path / "tst_core"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tst_core/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
