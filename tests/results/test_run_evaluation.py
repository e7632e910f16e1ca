"""``tst evaluate --all`` and ``--watch``: the checkpoints of a run, also while it trains."""

import contextlib
import fcntl
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import ON, ROOT, STEPS, TST, saving, small_job
from launches import wait_until
from tasks import TEXT, write_task
from torchtitan.experiments.tst.commands.harness_options import HarnessOptions
from torchtitan.experiments.tst.errors import ArgumentError
from torchtitan.experiments.tst.resilience.checkpoint import moves
from torchtitan.experiments.tst.resilience.checkpoint.inventory import complete_steps
from torchtitan.experiments.tst.resilience.checkpoint.manifests import (
    CheckpointError,
    read_manifest,
)
from torchtitan.experiments.tst.resilience.stop import STOP_SIGNALS, STOPPED_EXIT_CODE
from torchtitan.experiments.tst.results import export, run_evaluation
from torchtitan.experiments.tst.results.harness import Harness
from torchtitan.experiments.tst.results.run_evaluation import evaluate_run
from torchtitan.experiments.tst.results.scores import (
    EVALUATIONS_FILE,
    Score,
    read_evaluations,
    read_lines,
)
from torchtitan.experiments.tst.testing.ranks import free_port

CODE = [
    {"question": f"def {name}", "choices": ["(self", " the"], "answer": answer}
    for answer, name in enumerate(("read", "write"))
] + [{"question": "import", "choices": [" os", "):", " = 1", "\n\n"], "answer": 3}]
WORDS = [{"question": "return", "choices": [" None", " x"], "answer": i % 2} for i in range(5)]


@pytest.fixture
def tasks(tmp_path, offline_harness) -> Path:
    """A folder with the tasks "code", of 3 questions, and "words", of 5."""
    folder = tmp_path / "tasks"
    write_task(folder, "code", CODE)
    write_task(folder, "words", WORDS)
    return folder


@pytest.fixture
def harness(tasks) -> Harness:
    return Harness(["code", "words"], tasks, batch_size="1", device="cpu")


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A finished run with a full checkpoint of every step."""
    return shutil.copytree(whole.folder, tmp_path / "run", symlinks=True)


def places(run: Path) -> list[tuple[int, str]]:
    return [(e.step, e.task) for e in read_lines(run)]


def scores(run: Path) -> dict[tuple[int, str], Score]:
    return {(e.step, e.task): e.score for e in read_lines(run)}


EVERY = [(step, task) for step in range(1, STEPS + 1) for task in ("code", "words")]


@pytest.fixture(scope="module")
def undisturbed(whole, tmp_path_factory) -> dict[tuple[int, str], Score]:
    """The scores of each step, taken one model at a time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_task(folder / "tasks", "code", CODE)
    write_task(folder / "tasks", "words", WORDS)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        harness = Harness(["code", "words"], folder / "tasks", batch_size="1", device="cpu")
        for step in range(1, STEPS + 1):
            checkpoint = whole.checkpoints / f"step-{step}"
            with export.exported(checkpoint, []) as exported:
                model = harness.load(exported)
            for task, result in run_evaluation.scores_of(
                harness.run(model, ["code", "words"]), ["code", "words"]
            ).items():
                found[step, task] = result.score
    return found


def test_every_checkpoint_is_scored_once(run, tasks, tst, undisturbed, monkeypatch):
    exports = []
    monkeypatch.setattr(
        export, "export", lambda *args, do=export.export: exports.append(args[0].name) or do(*args)
    )
    args = ("--include-path", tasks, "--batch-size", 1, "--device", "cpu")
    result = tst("evaluate", run, "--all", *args, "--tasks", "code")
    assert result.code == 0, result.stderr
    assert places(run) == [(step, "code") for step in range(1, STEPS + 1)]
    assert exports == [f"step-{step}" for step in range(1, STEPS + 1)], "each once"
    assert "step-3: code " in result.stdout

    result = tst("evaluate", run, "--all", *args, "--tasks", "code,words")
    assert result.code == 0, result.stderr
    assert places(run)[STEPS:] == [(step, "words") for step in range(1, STEPS + 1)], "the new task"
    assert scores(run) == undisturbed
    table = result.stdout.splitlines()[-STEPS - 2 :]
    assert table[0].split() == ["step", "code", "words"]
    assert table[STEPS].startswith(f"{STEPS} ")
    assert table[STEPS].endswith(f" {undisturbed[STEPS, 'words']}")

    exports.clear()
    written = (run / EVALUATIONS_FILE).read_bytes()
    assert tst("evaluate", run, "--all", *args, "--tasks", "code,words").code == 0
    assert not exports and (run / EVALUATIONS_FILE).read_bytes() == written, "nothing is left to do"

    for evaluation in read_evaluations(run):
        manifest = read_manifest(run / "checkpoint" / f"step-{evaluation.step}")
        assert evaluation.data_tokens == manifest["data_tokens"]
        assert evaluation.latents == evaluation.step * 4 * 32
        assert evaluation.documents == {"code": 3, "words": 5}[evaluation.task]
        assert evaluation.metric == "acc" and evaluation.score.error > 0
    assert not list(run.glob("checkpoint/reading-*"))


class Training:
    """A run that continues each time that the evaluation waits.

    Args:
        finished: the run as it ends.
        run: folder of the run.
        saves: steps that it saves until the next look, and None for the run's end without a save.
        keep: checkpoints that it keeps.
    """

    def __init__(self, finished: Path, run: Path, saves: list[tuple[int, ...]], keep: int = STEPS):
        self.finished, self.run, self.saves, self.keep = finished, run, list(saves), keep

    def __call__(self, seconds: float) -> None:
        assert self.saves, "the evaluation waits for a run that has ended"
        (self.run / "checkpoint").mkdir(parents=True, exist_ok=True)
        shutil.copy(self.finished / "config.toml", self.run)
        for step in self.saves.pop(0):
            source = self.finished / "checkpoint" / f"step-{step}"
            shutil.copytree(source, self.run / "checkpoint" / f"step-{step}")
        kept = sorted(self.run.glob("checkpoint/step-*"), key=lambda path: int(path.name[5:]))
        for path in kept[: -self.keep]:
            shutil.rmtree(path)


def test_watch_until_the_run_ends(whole, tmp_path, harness, undisturbed, monkeypatch):
    """From before its folder exists; steps that it deletes before they are scored are missing."""
    run = tmp_path / "watched"
    training = Training(whole.folder, run, [(), (1,), (2, 3, 4), (5,), (6,)], keep=2)
    monkeypatch.setattr(run_evaluation.time, "sleep", training)
    said = []
    evaluate_run(run, [], harness, said.append, patience=1)
    assert places(run) == [place for place in EVERY if place[0] != 2]
    assert all(score == undisturbed[place] for place, score in scores(run).items())
    assert said.count("Waiting for the next checkpoint") == 1


def test_the_last_checkpoint_that_appears_during_the_last_look(
    whole, tmp_path, harness, undisturbed, monkeypatch
):
    run = tmp_path / "watched"
    training = Training(whole.folder, run, [(5,), (6,), ()])
    training(0)
    monkeypatch.setattr(run_evaluation.time, "sleep", training)

    pending = run_evaluation._Evaluator._pending

    def late(self, from_step):
        found = list(pending(self, from_step))
        if not found and len(training.saves) == 2:
            training(0)
        return iter(found)

    monkeypatch.setattr(run_evaluation._Evaluator, "_pending", late)
    evaluate_run(run, [], harness, lambda line: None, patience=1)
    assert places(run) == EVERY[-4:]


def test_a_run_of_another_trainer_is_watched_too(whole, tmp_path, harness, monkeypatch):
    """It writes no config; its job is given."""
    run, job = tmp_path / "watched", tmp_path / "job.toml"
    shutil.copy(whole.folder / "config.toml", job)
    (run / "checkpoint").mkdir(parents=True)

    steps = iter(range(5, STEPS + 1))

    def train(seconds: float) -> None:
        name = f"step-{next(steps)}"
        shutil.copytree(whole.checkpoints / name, run / "checkpoint" / name)

    monkeypatch.setattr(run_evaluation.time, "sleep", train)
    arguments = [f"--job.config_file={job}"]
    evaluate_run(run, arguments, harness, lambda line: None, patience=1)
    assert places(run) == EVERY[-4:]


@pytest.mark.parametrize(("restarts", "looks"), [("0", 2), ("1", 0)])
def test_a_start_by_slurm_is_no_sign_of_a_dead_run(run, harness, restarts, looks, monkeypatch):
    shutil.rmtree(run / "checkpoint" / f"step-{STEPS}")
    old = time.time() - 3 * 3600
    for path in [run / "config.toml", run / "metrics.jsonl", *run.glob("checkpoint/step-*")]:
        os.utime(path, (old, old))
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    sleeps, now = [], time.time()
    clock = SimpleNamespace(
        sleep=sleeps.append,
        time=lambda: now + 3600 * len(sleeps),
        monotonic=time.monotonic,
    )
    monkeypatch.setattr(run_evaluation, "time", clock)
    evaluate_run(run, [], harness, lambda line: None, patience=1)
    assert len(sleeps) == looks
    assert places(run) == EVERY[:-2]


def test_a_watch_that_is_killed_goes_on(whole, tmp_path, harness, undisturbed, monkeypatch):
    run = tmp_path / "watched"
    training = Training(whole.folder, run, [(1, 2), (3,), (4, 5, 6)])
    monkeypatch.setattr(run_evaluation.time, "sleep", training)

    class Killed(BaseException):
        pass

    def say(line: str) -> None:
        if line.startswith("step-3: code"):
            raise Killed

    with pytest.raises(Killed):
        evaluate_run(run, [], harness, say, patience=1)
    with (run / EVALUATIONS_FILE).open("a") as file:
        file.write('{"step": 3, "task": "wor')  # the line that it was writing
    evaluate_run(run, [], harness, lambda line: None, patience=1)
    assert places(run) == EVERY
    assert scores(run) == undisturbed
    assert not list(run.glob("checkpoint/reading-*"))


def test_a_dead_run_ends_the_watch(whole, tmp_path, harness, monkeypatch):
    run = tmp_path / "watched"
    now, hours = time.time(), itertools.count(step=0.6)  # from each look to the next
    clock = SimpleNamespace(
        sleep=Training(whole.folder, run, [(1,), (), (), ()]),
        time=lambda: now + 3600 * next(hours),
        monotonic=time.monotonic,
    )
    monkeypatch.setattr(run_evaluation, "time", clock)
    said = []
    evaluate_run(run, [], harness, said.append, patience=1)
    assert places(run) == EVERY[:2]
    assert said[-1] == f"{run} has written nothing for 1.2 hours: the wait ends"


def test_a_checkpoint_that_is_deleted_while_it_is_read(run, harness, undisturbed, monkeypatch):
    """The run deletes each checkpoint as soon as it has been opened."""

    def load(checkpoint: Path, *args, do=export._load):
        assert checkpoint.parent.name.startswith(f"reading-{checkpoint.name[5:]}-")
        shutil.rmtree(run / "checkpoint" / checkpoint.name)
        return do(checkpoint, *args)

    monkeypatch.setattr(export, "_load", load)
    evaluate_run(run, [], harness, lambda line: None)
    assert scores(run) == undisturbed
    assert not list(run.glob("checkpoint/*-*"))


def test_a_checkpoint_that_is_deleted_before_it_is_read(run, harness, undisturbed, monkeypatch):
    def linked(checkpoint: Path, do=moves.linked):
        if checkpoint.name == "step-2":
            shutil.rmtree(checkpoint)
        return do(checkpoint)

    monkeypatch.setattr(export, "linked", linked)
    said = []
    evaluate_run(run, [], harness, said.append)
    assert "step-2 was deleted before it was scored" in said
    assert places(run) == [place for place in EVERY if place[0] != 2]


def test_a_file_system_without_links(run, harness, undisturbed, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Operation not supported")

    monkeypatch.setattr(moves.os, "link", refuse)
    evaluate_run(run, [], harness, lambda line: None)
    assert scores(run) == undisturbed


def test_a_step_that_is_trained_again_is_scored_again(run, harness, undisturbed):
    evaluate_run(run, [], harness, lambda line: None)
    step = run / "checkpoint" / "step-2"
    shutil.rmtree(step)
    shutil.copytree(run / "checkpoint" / "step-5", step)  # other weights
    evaluate_run(run, [], harness, lambda line: None)
    assert places(run)[len(EVERY) :] == []  # the content is that of step 5, which has its score
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["xxh3_128"]
    files = manifest.pop("files")
    (step / "manifest.json").unlink()
    run_evaluation.manifests.write_manifest(step, manifest | {"step": 2}, files)
    evaluate_run(run, [], harness, lambda line: None)
    assert places(run)[len(EVERY) :] == [(2, "code"), (2, "words")]
    counted = {(e.step, e.task): e.score for e in read_evaluations(run)}
    assert counted[2, "code"] == undisturbed[5, "code"]
    assert counted[3, "code"] == undisturbed[3, "code"]


def test_a_damaged_checkpoint_is_skipped_and_named(run, harness):
    (file,) = (run / "checkpoint" / "step-4").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = []
    with pytest.raises(CheckpointError, match=rf"damaged: {file}: its checksum does not match"):
        evaluate_run(run, [], harness, said.append)
    assert places(run) == [place for place in EVERY if place[0] != 4]
    assert any(line.startswith("step-4 is skipped: the checkpoint is damaged") for line in said)


def test_a_last_checkpoint_that_lacks_a_file_ends_the_watch(run, harness):
    (file,) = (run / "checkpoint" / f"step-{STEPS}").glob("*.distcp")
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"step-{STEPS}.*No such file"):
        evaluate_run(run, [], harness, lambda line: None, patience=1)
    assert places(run) == EVERY[:-2]


def test_scores_of_a_replaced_checkpoint_do_not_count(run, tasks, harness):
    evaluate_run(run, [], harness, lambda line: None)
    step = run / "checkpoint" / "step-2"
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["xxh3_128"]
    files = manifest.pop("files")
    run_evaluation.manifests.write_manifest(step, manifest | {"skipped_steps": 1}, files)
    limited = Harness(["words"], tasks, batch_size="1", device="cpu", limit=2)
    evaluate_run(run, [], limited, lambda line: None)
    counted = {(e.step, e.task): e.documents for e in read_evaluations(run)}
    assert (counted[2, "words"], counted[3, "words"]) == (2, 5)
    assert (2, "code") not in counted
    table = run_evaluation.table_of_run(run, ["words"], 2)
    assert len(table) == 1 + STEPS and table != run_evaluation.table_of_run(run, ["words"], None)


def test_only_the_last_step(run, harness, undisturbed):
    evaluate_run(run, [], harness, lambda line: None, last_only=True)
    assert places(run) == EVERY[-2:]
    shutil.rmtree(run / "checkpoint" / f"step-{STEPS}")
    (run / EVALUATIONS_FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"no checkpoint of step {STEPS}\. Train with"):
        evaluate_run(run, [], harness, lambda line: None, last_only=True)


def test_one_evaluation_of_a_run_at_a_time(run, harness):
    with (run / EVALUATIONS_FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ArgumentError, match="another process is scoring this run"):
            evaluate_run(run, [], harness, lambda line: None)
    evaluate_run(run, [], harness, lambda line: None)


def test_a_limit_does_not_stand_for_the_whole_task(run, tasks, harness):
    shutil.rmtree(run / "checkpoint" / "step-1")
    limited = Harness(["words"], tasks, batch_size="1", device="cpu", limit=2)
    whole_task = Harness(["words"], tasks, batch_size="1", device="cpu")
    for settings in (limited, limited, whole_task, limited):
        evaluate_run(run, [], settings, lambda line: None)
    assert [e.documents for e in read_lines(run)] == [2] * (STEPS - 1) + [5] * (STEPS - 1)
    assert [e.documents for e in read_evaluations(run)] == [5] * (STEPS - 1)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for W&B: records the arguments of ``init``, WANDB_RESUME, and what is logged."""
    said = SimpleNamespace(inits=[], logged=[])

    def init(**kwargs):
        assert kwargs["resume_from"] is None and kwargs["fork_from"] is None
        said.inits.append((kwargs, os.environ.get("WANDB_RESUME")))

    fake = SimpleNamespace(
        init=init,
        log=said.logged.append,
        define_metric=lambda name, step_metric: None,
        run=None,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    return said


def test_wandb_that_cannot_start_does_not_end_the_evaluation(run, harness, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    evaluate_run(run, ["--metrics.enable_wandb"], harness, lambda line: None)
    assert places(run) == EVERY
    assert "Scores are not logged to W&B: ModuleNotFoundError" in caplog.text


def test_scores_go_where_the_run_logs(run, harness, undisturbed, wandb, monkeypatch):
    (run / "wandb_run_id").write_text("abc123\n")
    monkeypatch.setenv("WANDB_FORK_FROM", "another?_step=5")  # of the training run
    logs = ["--metrics.enable_tensorboard", "--metrics.enable_wandb"]
    for _ in range(2):  # the second time there is nothing to do
        evaluate_run(run, logs, harness, lambda line: None)
    tensorboard = EventAccumulator(str(run / "tb" / "evaluation")).Reload()
    tokens = {e.step: e.data_tokens for e in read_evaluations(run)}
    for task in ("code", "words"):
        expected = [undisturbed[step, task] for step in range(1, STEPS + 1)]
        for tag, values in (
            (f"evaluation/{task}(%)", [score.value for score in expected]),
            (f"evaluation_error/{task}(%)", [score.error for score in expected]),
        ):
            points = tensorboard.Scalars(tag)
            assert [point.step for point in points] == list(range(1, STEPS + 1))
            assert [point.value for point in points] == pytest.approx(values)
        points = tensorboard.Scalars(f"by_data_tokens/evaluation/{task}(%)")
        assert [point.step for point in points] == list(tokens.values())
    ((init, resume),) = wandb.inits
    assert (init["id"], resume) == ("abc123-evaluation", "allow")
    assert [line["step"] for line in wandb.logged] == [step for step, _ in EVERY]
    assert wandb.logged[0]["evaluation/code(%)"] == undisturbed[1, "code"].value
    assert wandb.logged[0]["n_tokens_seen"] == tokens[1]


def test_what_is_refused(run, tasks, tst, tmp_path):
    args = ("--include-path", tasks, "--tasks", "code", "--batch-size", 1)
    for more, error in (
        ((run / "checkpoint", "--all", *args), "must be a run folder with config.toml"),
        ((tmp_path / "no run", "--all", *args), "must be a run folder with config.toml"),
        ((run, "--all", "--output", "x.json", *args), "--all and --watch write evaluations.jsonl"),
        ((run, "--watch", "--patience", 0, *args), "--patience 0: must be at least 1"),
        ((run, "--all", "--patience", 2, *args), "--patience 2: works only with --watch"),
    ):
        result = tst("evaluate", *more)
        assert (result.code, error in result.stderr) == (2, True), result.stderr
    write_task(tasks, "texts", CODE, kind="generate_until", rest=TEXT)
    args = ("--include-path", tasks, "--batch-size", 1, "--tasks")
    result = tst("evaluate", run, "--all", *args, "texts")
    assert "--tasks texts: the harness has no accuracy for it" in result.stderr
    shutil.rmtree(run / "checkpoint")
    result = tst("evaluate", run, "--all", *args, "code")
    assert "has no checkpoint. Train with checkpoint.enable = true" in result.stderr


def test_a_second_signal_does_not_interrupt_the_removal_of_links(run, tasks):
    """Slurm signals every process of a job, and its batch script passes the signal on."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        HarnessOptions(tasks="code", include_path=tasks).build(["code"])
        with (
            pytest.raises(SystemExit) as stopped,
            moves.linked(run / "checkpoint" / "step-1"),
            contextlib.ExitStack() as stack,
        ):
            stack.callback(signal.raise_signal, signal.SIGUSR1)  # while it cleans up
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.code == STOPPED_EXIT_CODE
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not list(run.glob("checkpoint/reading-*"))


def test_links_that_a_killed_program_left_are_removed_by_the_next_launch(run):
    folder = run / "checkpoint"
    for name, age in (("reading-1-old", 2 * 24 * 3600), ("reading-1-new", 60)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    assert list(moves.tidy(folder)) == []
    assert [path.name for path in folder.glob("reading-*")] == ["reading-1-new"]


@pytest.mark.slow
def test_a_run_that_is_killed_resumed_and_purged_meanwhile(corpus, tmp_path, harness, monkeypatch):
    """Every step that is scored is scored once, and as in a run that keeps all its checkpoints."""

    def command(folder: Path, keep: int) -> list[str]:
        job = [*small_job(corpus), *ON, *saving(4), "--training.steps=80"]
        job += [f"--job.dump_folder={folder}", f"--checkpoint.keep_latest_k={keep}"]
        return [sys.executable, "-m", TST, *job]

    environment = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    whole, run, said = tmp_path / "whole", tmp_path / "run", []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = functools.partial(subprocess.Popen, cwd=ROOT, env=environment, **quiet)

    def train_until(step: int) -> None:
        process = start(command(run, 2))
        wait_until(lambda: max(complete_steps(run / "checkpoint"), default=0) >= step)
        process.kill()
        process.wait()

    def train_and_kill() -> None:
        for step in (8, 24, 44):
            train_until(step)
        assert start(command(run, 2)).wait() == 0

    monkeypatch.setattr(run_evaluation, "POLL_SECONDS", 0.05)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train_and_kill)
        evaluate_run(run, [], harness, said.append, patience=1)
        training.result()
    assert start(command(whole, 0)).wait() == 0
    evaluate_run(whole, [], harness, lambda line: None)

    found, expected = scores(run), scores(whole)
    assert len(places(run)) == len(found), "each once"
    assert found.keys() <= expected.keys() and {(80, "code"), (80, "words")} <= found.keys()
    assert all(score == expected[place] for place, score in found.items())
    print(f"{len(found) // 2} of {len(expected) // 2} checkpoints scored", *said, sep="\n")
    assert not list(run.glob("checkpoint/reading-*"))
