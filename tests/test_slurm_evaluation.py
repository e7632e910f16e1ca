"""Evaluations next to a run and after it, on a real Slurm of two nodes: `scripts/slurm/try.sh`."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import slurm_cluster
from jobs import ROOT
from slurm_cluster import DEMO, TRAIN, ends_well, output, steps_done, wait_for_step
from tasks import write_task
from torchtitan.experiments.tst.results.scores import read_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"Slurm {slurm_cluster.missing()}"),
]

EVALUATE = str(ROOT / "scripts" / "slurm" / "evaluate.sbatch")
STEPS, INTERVAL, BOUNDARY = 600, 50, 180
TASKS = {"short": 40, "long": 400}  # numbers of questions
# Keeps an export from going on, and makes the removal of its files slow. The process then has links
# to a checkpoint and a temporary export.
SLOW_EXPORT = """\
import sys, time

seconds = iter([600])

def wait(event, arguments):
    if event == "open" and "/reading-" in str(arguments[0]):
        time.sleep(next(seconds, 1))

sys.addaudithook(wait)
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, corpus) -> Path:
    """A folder to submit evaluations in, with the folder "my tasks"."""
    folder = tmp_path_factory.mktemp("outputs of jobs")
    (folder / "tmp").mkdir()
    lines = (corpus / "validation.jsonl").read_text().splitlines()
    text = "".join(json.loads(line)["text"] for line in lines)
    endings = [text[start : start + 12] for start in range(0, 100_000, 60)]
    for name, number in TASKS.items():
        questions = [
            {
                "question": text[60 * at - 48 : 60 * at],
                "choices": [*endings[at + 1 : at + 1 + at % 4], *endings[at : at + 1], "\n\n"],
                "answer": at % 4,
            }
            for at in range(1, number + 1)
        ]
        write_task(folder / "my tasks", name, questions)
    return folder


@pytest.fixture(scope="module")
def train(cluster, outputs):
    """Submit a training on two nodes; gives the job's number and its run folder."""

    def run(name: str, *args: str) -> tuple[str, Path]:
        folder = outputs / name
        command = ["sbatch", "--parsable", f"--output={folder}.out", "--nodes=2", TRAIN]
        command += [f"--training.steps={STEPS}", f"--checkpoint.interval={INTERVAL}"]
        command += ["--validation.freq=300", "--metrics.log_freq=1", *args]
        return cluster.run(*command, f"--job.dump_folder={folder}", CONFIG_FILE=DEMO), folder

    return run


@pytest.fixture(scope="module")
def evaluate(cluster, outputs):
    """Submit an evaluation in ``outputs``; gives the job's number and the stem of its output."""
    here = slurm_cluster.Cluster(cluster.environment, outputs)

    def run(name: str, *options: str, **variables: str) -> tuple[str, Path]:
        log = outputs / f"evaluation of {name}"
        command = ["sbatch", "--parsable", f"--output={log}.out", *options, EVALUATE, name]
        command += ["--tasks=short,long", "--include-path=my tasks", "--batch-size=8"]
        variables |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(outputs / "hub")}
        return here.run(*command, TMPDIR=str(outputs / "tmp"), **variables), log

    return run


def left_behind(outputs: Path, run: Path) -> list[Path]:
    """Return temporary files of evaluations that have ended."""
    return [*run.glob("checkpoint/reading-*"), *(outputs / "tmp").glob("export-*")]


def places(run: Path) -> list[tuple[int, str]]:
    """Return step and task of each line of ``evaluations.jsonl``; none before there is the file."""
    return [(e.step, e.task) for e in read_lines(run)]


def values(run: Path) -> dict[tuple[int, str], tuple]:
    """Return what is in ``evaluations.jsonl``, except what identifies the checkpoints."""
    return {
        (e.step, e.task): (e.score.value, e.score.error, e.documents, e.data_tokens, e.latents)
        for e in read_lines(run)
    }


def waits(log: Path, start: int = 1) -> bool:
    """Return whether an evaluation waits for its run, after so many starts."""
    return "Waiting" in output(log).partition(f", start {start}: ")[2]


def wait_until(cluster, job: str, log: Path, happened: Callable[[], bool]) -> None:
    """Wait for an event while a job runs, or fail with its output."""
    end = time.monotonic() + 900
    while not (Path(f"{log}.out").exists() and happened()):
        at_work = cluster.state(job) in ("PENDING", "RUNNING", "COMPLETING")
        assert time.monotonic() < end and at_work, output(log)[-6000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def disturbed(cluster, outputs, train, evaluate) -> Path:
    """A run that keeps two checkpoints, evaluated meanwhile; both jobs are queued again once."""
    evaluation, log = evaluate("disturbed")  # before there is a run
    wait_until(cluster, evaluation, log, lambda: waits(log))
    job, run = train("disturbed", "--checkpoint.keep_latest_k=2")
    wait_until(cluster, evaluation, log, lambda: len(places(run)) > 0)
    step = steps_done(run)[-1]
    cluster.run("scancel", "--signal=USR1", job)
    wait_for_step(cluster, job, run, step + INTERVAL)
    wait_until(cluster, evaluation, log, lambda: len(places(run)) % len(TASKS) == 1)
    cluster.run("scancel", "--batch", "--signal=USR1", evaluation)
    ends_well(cluster, job, run)
    ends_well(cluster, evaluation, log)
    for number, path in ((job, run), (evaluation, log)):
        assert output(path).count(f"Job {number}, start 2:") == 1
        assert output(path).count("requeueing the job") == 1
    assert steps_done(run) == list(range(1, STEPS + 1))
    return run


def test_each_step_is_scored_once_while_both_jobs_are_queued_again(outputs, disturbed):
    """Except for checkpoints that the run deletes before they are scored."""
    found = places(disturbed)
    assert len(set(found)) == len(found)
    assert {(STEPS, task) for task in TASKS} <= set(found)
    assert len({step for step, _ in found}) >= 4
    assert left_behind(outputs, disturbed) == []


def test_the_scores_are_those_of_an_undisturbed_run(cluster, outputs, disturbed, train, evaluate):
    """Which keeps all checkpoints, and is evaluated after its end."""
    job, run = train("undisturbed", "--checkpoint.keep_latest_k=0")
    ends_well(cluster, job, run)
    evaluation, log = evaluate("undisturbed")
    ends_well(cluster, evaluation, log)
    bars = output(log).count("Running loglikelihood requests:")
    assert bars <= 4 * len(places(run)), "not ten a second"
    saved = sorted({BOUNDARY, *range(INTERVAL, STEPS + 1, INTERVAL)})
    assert places(run) == [(step, task) for step in saved for task in TASKS]
    expected, found = values(run), values(disturbed)
    assert len({value[0] for value in expected.values()}) > len(saved), "steps have other scores"
    same = expected.keys() & found.keys()
    (stop,) = re.findall(r"Stopped after step (\d+) ", output(disturbed))
    assert {step for step, _ in found.keys() - same} <= {int(stop)}
    assert len(same) >= 6
    assert {place: found[place] for place in same} == {place: expected[place] for place in same}
    assert left_behind(outputs, run) == []


def test_an_evaluation_is_queued_again_until_it_is_cancelled(cluster, evaluate):
    """At a time limit and after preemption; here it waits for a run that does not begin."""
    job, log = evaluate("nothing", "--time=60")
    wait_until(cluster, job, log, lambda: waits(log))
    # brought near: Slurm signals it 120 seconds before, and up to a minute earlier
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+150")
    wait_until(cluster, job, log, lambda: "requeueing the job" in output(log))
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_until(cluster, job, log, lambda: waits(log, start=2))
    cluster.run("srun", "--partition=urgent", "--nodes=2", "--ntasks=4", "true")  # preempts it
    wait_until(cluster, job, log, lambda: waits(log, start=3))
    cluster.run("scancel", job)
    assert cluster.wait_for(job, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    assert f"Job {job}, start 4" not in output(log)


def test_a_cancelled_evaluation_leaves_nothing(cluster, outputs, train, evaluate):
    job, run = train("short", "--training.steps=2", "--checkpoint.interval=1")
    ends_well(cluster, job, run)
    (outputs / "slow").mkdir()
    (outputs / "slow" / "sitecustomize.py").write_text(SLOW_EXPORT)
    evaluation, log = evaluate("short", PYTHONPATH=str(outputs / "slow"))
    wait_until(cluster, evaluation, log, lambda: len(left_behind(outputs, run)) == 2)
    cluster.run("scancel", evaluation)
    assert cluster.wait_for(evaluation, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    assert left_behind(outputs, run) == []
    assert places(run) == [] and "start 2" not in output(log)
    evaluation, log = evaluate("short")
    ends_well(cluster, evaluation, log)
    assert places(run) == [(step, task) for step in (1, 2) for task in TASKS]
