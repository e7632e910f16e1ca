"""Fixtures: a small corpus, trainers in this process, launches of several processes."""

import contextlib
import functools
import importlib
import itertools
import logging
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch.distributed as dist
import tyro._docstrings
import tyro._unsafe_cache

import launches
import slurm_cluster
from corpora import tokenize
from jobs import IN_STAGES, ON, ROOT, SAVE, Run, small_job
from launches import Launch
from torchtitan.experiments.tst import models
from torchtitan.experiments.tst.__main__ import main as tst_main
from torchtitan.experiments.tst.config.job_config import JobConfig
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.data.demo_corpus import make_corpus
from torchtitan.experiments.tst.data.shards.tokenization import Options
from torchtitan.experiments.tst.data.text import datasets
from torchtitan.experiments.tst.metrics_file import read_metrics
from torchtitan.experiments.tst.testing import ranks
from torchtitan.experiments.tst.testing.ranks import free_port
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer
from torchtitan.experiments.tst.upstream.cpu import enable_cpu_if_alone

enable_cpu_if_alone()
models.register()
datasets.register()

# Where tyro sees pytest it checks its caches by computing again; and it reads the source of each
# config class again for each command line. Without the two, a command line takes half the time.
mock.patch.object(tyro._unsafe_cache, "sys", types.SimpleNamespace(modules={})).start()
_of_source = tyro._docstrings._ClassTokenization
mock.patch.object(_of_source, "make", functools.cache(_of_source.make)).start()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with train.jsonl, validation.jsonl and tokenizer/, of 1024 entries."""
    folder = tmp_path_factory.mktemp("data") / "corpus"
    library = Path(sysconfig.get_path("stdlib"))
    make_corpus(folder, [path.read_text() for path in sorted(library.glob("[a-h]*.py"))])
    return folder


@pytest.fixture(scope="session")
def tokens(corpus) -> Path:
    """The corpus's train.jsonl as token shards, in its order."""
    folder = corpus.parent / "tokens"
    options = Options(tokenizer=str(corpus / "tokenizer"), shuffle="none")
    tokenize(corpus / "train.jsonl", folder, options)
    return folder


@pytest.fixture(scope="session")
def base_args(corpus) -> list[str]:
    """A small, deterministic job on the corpus, without a [superposition] section."""
    return small_job(corpus)


@pytest.fixture
def make_config(base_args, tmp_path) -> Callable[..., JobConfig]:
    def make(*args: str) -> JobConfig:
        folder = f"--job.dump_folder={tmp_path / 'run'}"
        return SuperpositionConfigManager().parse_args([*base_args, folder, *args])

    return make


@contextlib.contextmanager
def _launch_of_one(patch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }.items():
        patch.setenv(name, value)
    patch.setattr("torchtitan.train.time.sleep", lambda seconds: None)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture
def one_process(monkeypatch):
    """The environment of a launch with one process; its process group is destroyed at the end."""
    with _launch_of_one(monkeypatch):
        yield


def _train(config: JobConfig, trainer_class: type) -> list[dict]:
    trainer = trainer_class(config)
    try:
        trainer.train()
    finally:
        if dist.is_initialized():  # a run that was stopped has closed itself
            trainer.close()
            dist.destroy_process_group()
    return read_metrics(config.job.dump_folder)


@pytest.fixture
def train(make_config, one_process) -> Callable[..., list[dict]]:
    """Train in this process; gives the lines of metrics.jsonl."""

    def run(*args: str, trainer_class: type = SuperpositionTrainer) -> list[dict]:
        return _train(make_config(*args), trainer_class)

    return run


@pytest.fixture(scope="session")
def finished(base_args, tmp_path_factory) -> Callable[..., Run]:
    """A run of a job, trained when it is first asked for; its folder is to be left as it is."""
    runs: dict[tuple[str, ...], Run] = {}

    def run(*args: str) -> Run:
        if args not in runs:
            folder = tmp_path_factory.mktemp("finished")
            job = [*base_args, f"--job.dump_folder={folder}", *args]
            with pytest.MonkeyPatch.context() as patch, _launch_of_one(patch):
                config = SuperpositionConfigManager().parse_args(job)
                runs[args] = Run(_train(config, SuperpositionTrainer), folder)
        return runs[args]

    return run


@pytest.fixture(scope="session")
def whole(finished) -> Run:
    """The small job in two phases, with a full checkpoint of every step."""
    return finished(*ON, *SAVE)


@pytest.fixture(scope="session")
def staged(finished) -> Run:
    """As ``whole``, of the small job in stages."""
    return finished(*IN_STAGES, *SAVE)


@pytest.fixture
def launch(base_args, tmp_path) -> Callable[..., Launch]:
    """Run a module on the small job in several processes; fails the test if it fails."""
    numbers = itertools.count()

    def run(module: str, *args: str, processes: int = 1, check: bool = True) -> Launch:
        folder = tmp_path / f"launch-{next(numbers)}"
        found = launches.fork(module, [*base_args, *args], processes, folder)
        return launches.succeeded(found) if check else found

    return run


@pytest.fixture
def on_ranks(tmp_path) -> Callable[..., None]:
    """Call a function of a test module in several processes that can talk to each other."""

    def run(processes: int, function: Callable[..., None], *args: object) -> None:
        if log := ranks.run_ranks(launches.in_group, processes, tmp_path, function, *args):
            pytest.fail(log)

    return run


@pytest.fixture
def offline_harness(monkeypatch):
    """The LM-Eval harness without a network, and without the tasks that come with it.

    To look through these takes 13 seconds.
    """
    from torchtitan.experiments.tst.results import harness  # here: this import takes seconds

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    own_tasks = functools.partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", own_tasks)


class ScriptResult(NamedTuple):
    code: int
    stdout: str
    stderr: str


def _run_main(main: Callable[[], None], capsys: pytest.CaptureFixture) -> ScriptResult:
    level, code, message = logging.getLogger().level, 0, ""
    try:
        with mock.patch.dict(os.environ):
            main()
    except SystemExit as end:  # as Python does: a message goes to standard error
        code, message = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
    finally:
        logging.getLogger().setLevel(level)
    stdout, stderr = capsys.readouterr()
    return ScriptResult(code, stdout, stderr + message)


@pytest.fixture
def run_script(monkeypatch, capsys) -> Callable[..., ScriptResult]:
    """Run one of scripts/ in this process, which saves seconds of imports each time."""

    def run(name: str, *args: object) -> ScriptResult:
        monkeypatch.syspath_prepend(ROOT.joinpath("scripts", name).parent)
        monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *map(str, args)])
        monkeypatch.chdir(ROOT)
        return _run_main(lambda: importlib.import_module(Path(name).name).main(), capsys)

    return run


@pytest.fixture
def tst(monkeypatch, capsys) -> Callable[..., ScriptResult]:
    """Run a command of ``tst`` in this process, which saves seconds of imports each time."""

    def run(*args: object) -> ScriptResult:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["tst", *map(str, args)])
        return _run_main(tst_main, capsys)

    return run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[slurm_cluster.Cluster]:
    """A throwaway Slurm whose jobs have this Python."""
    os.environ.pop("SBATCH_PARTITION", None)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm"), ROOT) as running:
        running.environment |= {
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{Path(sys.executable).parent}:{running.environment['PATH']}",
            "NGPU": "1",
        }
        yield running
