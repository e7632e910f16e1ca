"""Score the checkpoints of a run on tasks of the LM-Eval harness, also while the run trains."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from torchtitan.config import JobConfig

from ..errors import ArgumentError
from ..metrics_file import METRICS_FILE
from ..resilience.checkpoint import inventory, manifests, moves
from ..resilience.checkpoint.inventory import Checkpoint, Kind
from ..resilience.checkpoint.manifests import CheckpointError
from ..resilience.run_folder import CONFIG_FILE
from .evaluation_record import EvaluationRecord
from .export import exported, read_job
from .harness import Harness, scores_of
from .scores import Evaluation, read_evaluations
from .tables import aligned

POLL_SECONDS = 30.0  # between two looks for a new checkpoint


def evaluate_run(
    run: Path,
    job_arguments: list[str],
    harness: Harness,
    say: Callable[[str], None],
    *,
    last_only: bool = False,
    patience: float | None = None,
) -> None:
    """Score the checkpoints of a run, and append the scores to its ``evaluations.jsonl``.

    A task that a checkpoint has been scored on is skipped. Each checkpoint is exported once. Its
    score on a task is written as soon as it is there.

    Args:
        run: the run folder.
        job_arguments: arguments of the job, which override the run's config.
        harness: the harness with its settings.
        say: called with each line of progress.
        last_only: score only the checkpoint of the last step.
        patience: wait for new checkpoints until the run ends, or has written nothing for so many
            hours; None to score what is there and not wait.

    Raises:
        ArgumentError: for tasks that the harness does not know or has no accuracy for, or if
            another process scores the run.
        CheckpointError: if there is no checkpoint to score, or, at the end, for those that are
            damaged.
        ExportError: for a model that cannot be exported.
    """
    harness.check()
    harness.check_accuracies()
    wait = _Wait(run, patience or 0, say)
    if patience is not None and not _names_job(job_arguments):
        while not (run / CONFIG_FILE).is_file() and wait.for_next(run / CONFIG_FILE):
            pass
    _check_run_folder(run, job_arguments)
    job_config = _job_of(run, job_arguments)
    with EvaluationRecord(run, job_config, harness.tasks) as record:
        evaluator = _Evaluator(run, job_arguments, harness, record, say)
        moves.remove_old_links(evaluator.folder)
        if not (job_config.checkpoint.enable or evaluator.checkpoints()):
            patience = None
        while True:
            steps = _job_of(run, job_arguments).training.steps  # a later launch may extend the run
            has_ended = any(found.step >= steps for found in evaluator.checkpoints())
            evaluator.score_all(steps if last_only else 0)
            if patience is None or has_ended or not wait.for_next("the next checkpoint"):
                break
    if not evaluator.seen:
        raise CheckpointError(
            f"{evaluator.folder} has no checkpoint{f' of step {steps}' * last_only}. Train with "
            "checkpoint.enable = true"
        )
    if evaluator.damaged:
        raise CheckpointError("; ".join(evaluator.damaged.values()))


def table_of_run(run: Path, tasks: list[str], limit: int | None) -> list[str]:
    """Return the scores of a run as lines of text: a row for each step, a column for each task.

    Args:
        run: the run folder.
        tasks: names of the tasks.
        limit: the limit of documents of the scores; None for those of whole tasks.
    """
    scores = {(e.step, e.task): e.score for e in read_evaluations(run, limit)}
    steps = sorted({step for step, _ in scores})
    rows = [
        [f"{step:,}", *(str(scores.get((step, task), "-")) for task in tasks)] for step in steps
    ]
    return aligned([["step", *tasks], *rows])


class _Evaluator:
    """Scores checkpoints of a run.

    Attributes:
        folder: folder of the run's checkpoints.
        seen: whether there has been a checkpoint to score, or that is scored.
        damaged: what is wrong with the checkpoints that could not be read, by their step.
    """

    def __init__(
        self,
        run: Path,
        job_arguments: list[str],
        harness: Harness,
        record: EvaluationRecord,
        say: Callable[[str], None],
    ):
        self.folder = inventory.checkpoints_of(run)
        self.job_arguments, self.harness = job_arguments, harness
        self.record, self.say = record, say
        self.seen = False
        self.damaged: dict[int, str] = {}
        self._failed: set[tuple[int, str]] = set()  # step and identity

    def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints that are complete, or were once, by ascending step."""
        kinds = (Kind.FULL, Kind.MODEL, Kind.HUGGING_FACE, Kind.DAMAGED)
        return [c for c in inventory.list_checkpoints(self.folder) if c.kind in kinds]

    def score_all(self, from_step: int) -> None:
        """Score all checkpoints that are there, the oldest first, and those that appear meanwhile.

        Args:
            from_step: the first step to score.
        """
        while found := next(self._pending(from_step), None):
            checkpoint, identity, tasks = found
            try:
                self._score(checkpoint, identity, tasks)
                self.damaged.pop(checkpoint.step, None)  # the step has been saved again
            except CheckpointError as error:
                self._failed.add((checkpoint.step, identity))
                if not checkpoint.path.exists():
                    self.say(f"{checkpoint.path.name} was deleted before it was scored")
                elif checkpoint.step not in self.damaged:
                    self.damaged[checkpoint.step] = str(error)
                    self.say(f"{checkpoint.path.name} is skipped: {error}")

    def _pending(self, from_step: int) -> Iterator[tuple[Checkpoint, str, list[str]]]:
        """Yield checkpoints that are not scored on all tasks, their identity and these tasks."""
        for checkpoint in self.checkpoints():
            if checkpoint.step < from_step:
                continue
            self.seen = True
            try:
                identity = manifests.identity(checkpoint.path)
            except CheckpointError:  # exporting it says what is wrong
                identity = ""
            tasks = [
                task
                for task in self.harness.tasks
                if not self.record.has(identity, task, self.harness.limit)
            ]
            if tasks and (checkpoint.step, identity) not in self._failed:
                yield checkpoint, identity, tasks

    def _score(self, checkpoint: Checkpoint, identity: str, tasks: list[str]) -> None:
        manifest = manifests.read_manifest(checkpoint.path) or {}
        facts = manifest.get("run", {})
        per_step = facts.get("training.seq_len", 0) * facts.get("training.global_batch_size", 0)
        with exported(checkpoint.path, self.job_arguments) as folder:
            model = self.harness.load(folder)
        if checkpoint.path.exists() and manifests.identity(checkpoint.path) != identity:
            return  # the step was saved again meanwhile
        for task in tasks:
            began = time.monotonic()
            found = scores_of(self.harness.run(model, [task]), [task])
            if task not in found:  # a group without a mean of its tasks
                raise ArgumentError(
                    f"--tasks {task}: the harness has no accuracy for the group. Give its tasks"
                )
            metric, score, documents = found[task]
            self.record.add(
                Evaluation(
                    step=checkpoint.step,
                    task=task,
                    metric=metric,
                    score=score,
                    documents=documents,
                    limit=self.harness.limit,
                    data_tokens=manifest.get("data_tokens"),
                    latents=checkpoint.step * per_step or None,
                    checkpoint=identity,
                )
            )
            seconds = time.monotonic() - began
            self.say(f"{checkpoint.path.name}: {task} {score} % ({seconds:.0f} s)")


class _Wait:
    """Waits for the next checkpoint of a run.

    Args:
        run: the run folder.
        hours: a run that has written nothing for so many hours counts as dead.
        say: called with each line of progress.
    """

    def __init__(self, run: Path, hours: float, say: Callable[[str], None]):
        self.run, self.hours, self.say = run, hours, say
        self.last_sign = time.time()
        self.said = ""

    def for_next(self, what: object) -> bool:
        """Wait a moment for a file or a checkpoint; return False if the run counts as dead."""
        silent = time.time() - self._last_sign()
        if silent > 3600 * self.hours:
            self.say(f"{self.run} has written nothing for {silent / 3600:.1f} hours: the wait ends")
            return False
        line = f"Waiting for {what}"
        if line != self.said:
            self.say(line)
            self.said = line
        time.sleep(POLL_SECONDS)
        return True

    def _last_sign(self) -> float:
        """Return the time of the newest file of the run, or of the start of this wait.

        A start by Slurm after a time limit or a preemption is no sign, if the run has files.
        """
        checkpoints = inventory.list_checkpoints(inventory.checkpoints_of(self.run))
        files = [self.run / CONFIG_FILE, self.run / METRICS_FILE, *(c.path for c in checkpoints)]
        times = []
        for path in files:
            with suppress(OSError):  # not there, or deleted in this moment
                times.append(path.stat().st_mtime)
        if times and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            return max(times)
        return max(self.last_sign, *times, 0)


def _names_job(job_arguments: list[str]) -> bool:
    return any(argument.startswith("--job.config_file") for argument in job_arguments)


def _check_run_folder(run: Path, job_arguments: list[str]) -> None:
    if not run.is_dir() or not (_names_job(job_arguments) or (run / CONFIG_FILE).is_file()):
        raise ArgumentError(
            f"{run}: must be a run folder with {CONFIG_FILE} to score all its checkpoints. For a "
            "run of TorchTitan's own trainer, give the job with --job.config_file"
        )


def _job_of(run: Path, job_arguments: list[str]) -> JobConfig:
    return read_job(inventory.checkpoints_of(run) / "any", job_arguments)
