"""How ``tst`` finds a command, tells its arguments from the job's, and says an error."""

import builtins
import contextlib
import importlib
import logging
import re
import subprocess
import sys
from itertools import chain
from unittest import mock

import huggingface_hub
import pytest

from jobs import ROOT
from torchtitan.experiments.tst import __main__ as entry
from torchtitan.experiments.tst.commands import COMMANDS, running
from torchtitan.experiments.tst.commands.arguments import job_arguments, split_overrides
from torchtitan.experiments.tst.testing import ranks

PACKAGE = "torchtitan.experiments.tst"
DEMO = "train_configs/demo/tst.toml"


@pytest.mark.parametrize(
    ("arguments", "own", "overrides"),
    [
        ("JOB --ranks 8 --training.steps 100", "JOB --ranks 8", "--training.steps 100"),
        ("JOB --training.steps=100 --ranks 8", "JOB --ranks 8", "--training.steps=100"),
        ("JOB --optimizer.lr 3.0 --gpu B200", "JOB --gpu B200", "--optimizer.lr 3.0"),
        ("JOB --checkpoint.load_step -1", "JOB", "--checkpoint.load_step -1"),
        ("JOB --vary superposition.bag_size=2,4", "JOB --vary superposition.bag_size=2,4", ""),
        ("JOB --plot=a.png --compile.enable", "JOB --plot=a.png", "--compile.enable"),
        ("A --x.y 1 -- B --ranks 2", "A", "--x.y 1 -- B --ranks 2"),
        ("A -- B", "A", "-- B"),
        ("", "", ""),
    ],
)
def test_the_jobs_arguments_have_a_dot(arguments, own, overrides):
    assert split_overrides(arguments.split()) == (own.split(), overrides.split())


def test_one_job_is_named():
    assert job_arguments("a.toml", ["--training.steps=1"]) == [
        "--job.config_file=a.toml",
        "--training.steps=1",
    ]
    with pytest.raises(ValueError, match=r"the job is a\.toml already"):
        job_arguments("a.toml", ["--job.config-file", "b.toml"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("chekc", "did you mean check?"),
        ("dryrun", "did you mean dry-run?"),
        ("frobnicate", "it must be one of configs, assets,"),
    ],
)
def test_an_unknown_command_suggests_the_nearest(tst, name, hint):
    result = tst(name, DEMO)
    assert result.code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"tst {name}: no such command; {hint}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ("check", DEMO, "--ranks"),
        ("check", DEMO, "--nproc"),
        ("check", DEMO, "--nnodes"),
        ("plan", DEMO, "--ranks"),
        ("dry-run", DEMO, "--ranks"),
        ("train", DEMO, "--nproc"),
        ("sweep", "run", "no sweep", "--jobs"),
        ("sweep", "run", "no sweep", "--nproc"),
        ("evaluate", "no model", "--limit"),
        ("tokenize", "a.jsonl", "shards", "--tokenizer=x", "--workers"),
        ("tokenize", "a.jsonl", "shards", "--tokenizer=x", "--tasks"),
    ],
)
@pytest.mark.parametrize("number", [0, -2])
def test_numbers_of_things_are_positive(tst, command, number):
    result = tst(*command[:-1], f"{command[-1]}={number}")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == f"error: {command[-1]} {number}: must be at least 1\n"


def test_an_unknown_option_suggests_the_nearest(tst):
    result = tst("plan", DEMO, "--rank", 8)
    assert result.code == 2
    assert "Unrecognized options: --rank" in result.stderr and "--ranks N" in result.stderr


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ([DEMO, "--training.stepz=3"], "config error: training.stepz = '3': unknown key"),
        (["no.toml"], "config error: job.config_file = 'no.toml': No such file"),
        ([DEMO, "--job.config_file=b.toml"], "error: --job.config_file=b.toml: the job is"),
        ([DEMO, "--mfu=2"], "error: --mfu 2.0: must be in (0, 1]"),
        ([DEMO, "--plot=plan.xyz"], "error: --plot plan.xyz: must end with one of .png, .pdf"),
    ],
)
def test_an_error_is_one_line(tst, command, error):
    result = tst("plan", *command)
    assert result.code == 2 and result.stdout == ""
    assert result.stderr.startswith(error) and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("export", "FOLDER", "output"), "config.toml"),
        (("sweep", "table", "FOLDER"), "sweep.json"),
        (
            ("tokenize", "CORPUS/train.jsonl", "FOLDER", "--tokenizer=CORPUS/tokenizer"),
            "corpus.json",
        ),
    ],
)
def test_a_damaged_file_is_named(tst, corpus, tmp_path, command, file):
    (tmp_path / file).write_bytes(b"\xff{")
    words = [word.replace("CORPUS", str(corpus)) for word in command]
    result = tst(*(word.replace("FOLDER", str(tmp_path)) for word in words))
    assert result.code == 2 and result.stdout == ""
    assert f"{tmp_path / file} is damaged: " in result.stderr and result.stderr.count("\n") == 1


def test_a_command_prints_its_own_error_in_a_rank_too(tst, monkeypatch, tmp_path):
    """Such as a subprocess of one, whose error file is not the command's."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TST_LAUNCH", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert tst("plan", "no.toml").stderr.startswith("config error: job.config_file = 'no.toml'")
    assert not list(tmp_path.iterdir())


def test_a_fault_of_the_code_keeps_its_traceback(tst, monkeypatch):
    def fail(*args):
        raise KeyError("a fault")

    monkeypatch.setattr(running._module("plan"), "make_plan", fail)
    with pytest.raises(KeyError, match="a fault"):
        tst("plan", DEMO, "--no-memory")


def run_without(packages, *commands):
    """Run commands in this process, one of its own, as if packages were not installed."""
    import_ = builtins.__import__

    def import_others(name, *args, **kwargs):
        if name.partition(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_(name, *args, **kwargs)

    _ = huggingface_hub.snapshot_download  # which needs tqdm itself
    for name in list(sys.modules):  # of ours, which have imported them
        if name.startswith(f"{PACKAGE}.") and not name.startswith(f"{PACKAGE}.upstream"):
            del sys.modules[name]
    builtins.__import__ = import_others
    main = importlib.import_module(f"{PACKAGE}.__main__").main
    for command in commands:
        sys.argv = ["tst", *command]
        with contextlib.suppress(SystemExit):
            main()


@pytest.fixture
def shown_without(tmp_path):
    """What commands write where packages are not installed."""

    def run(packages, *commands):
        log = ranks.run_ranks(run_without, 1, tmp_path, packages, *commands)
        assert log is None, log
        return (tmp_path / ranks.LOG.format(rank=0)).read_text()

    return run


def test_a_missing_extra_is_named(shown_without):
    missing = {
        ("compare", "run"): ("matplotlib", "demo"),
        ("tokenize", "source", "folder", "--tokenizer=t"): ("datatrove", "data"),
        ("sample", "run"): ("transformers", "eval"),
        ("evaluate", "run"): ("lm_eval", "eval"),
    }
    packages = {package for package, _ in missing.values()}
    assert shown_without(packages, *missing).splitlines() == [
        f'tst {command[0]} needs {package}: pip install "torchtitan-tst[{extra}]"'
        for command, (package, extra) in missing.items()
    ]


def test_help_needs_no_extra(shown_without):
    names = list(chain(*COMMANDS.values()))
    completion = ("--tyro-print-completion", "bash")
    shown = shown_without(set(running._EXTRAS), *((name, "--help") for name in names), completion)
    assert re.findall("^usage: tst ([a-z-]+) ", shown, re.MULTILINE) == names
    assert "# Bash completion for tst" in shown


def test_a_job_may_have_an_extension_in_the_current_folder(tst, tmp_path, monkeypatch):
    """As with ``python -m``; a console script is not told of it by Python."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    assert tst("diff", DEMO, DEMO).code == 0
    assert sys.path[0] == str(ROOT)


def test_what_else_torchtitan_says_is_shown(tst, monkeypatch):
    def compare(*jobs):
        logging.getLogger().warning("HF assets path none does not exist!")
        logging.getLogger().warning("something else")
        return {}

    monkeypatch.setattr(running._module("diff"), "differences", compare)
    with mock.patch.object(logging, "lastResort", logging.StreamHandler(sys.stderr)) as shown:
        monkeypatch.setattr(logging.getLogger(), "handlers", [shown])
        said = tst("diff", DEMO, DEMO).stderr
    assert said == "something else\n"


def test_shell_completion_is_tyros(tst):
    result = tst("--tyro-print-completion", "bash")
    assert result.code == 0
    assert "dry-run" in result.stdout and "--nnodes" in result.stdout


def test_planning_starts_anew_without_gpus_where_there_are_some(monkeypatch):
    calls = []
    monkeypatch.setattr(entry.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(entry.os, "execve", lambda *args: calls.append(args))
    monkeypatch.setattr(sys, "argv", ["tst", "plan", "--help"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SystemExit):
        entry.main()
    ((program, command, environment),) = calls
    assert command == [program, "-m", "torchtitan.experiments.tst", "plan", "--help"]
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as it is then
    with pytest.raises(SystemExit):
        entry.main()
    assert len(calls) == 1


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "torchtitan.experiments.tst", "configs", "lits"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "Unrecognized options: lits" in result.stderr
