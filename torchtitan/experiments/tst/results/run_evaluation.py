"""Score the checkpoints of a run on tasks of the LM-Eval harness, also while the run trains."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torchtitan.config import JobConfig

from ..errors import ArgumentError
from ..resilience.checkpoint import inventory, manifests
from ..resilience.checkpoint.inventory import Checkpoint
from ..resilience.checkpoint.manifests import CheckpointError
from ..resilience.run_folder import CONFIG_FILE
from ..training.metrics import METRICS_FILE
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
    watch: float | None = None,
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
        watch: wait for new checkpoints until the run ends, or has written nothing for so many
            hours; None to score what is there and not wait.

    Raises:
        ArgumentError: for tasks that the harness does not know, or if another process scores the
            run.
        CheckpointError: if there is no checkpoint to score, or, at the end, for those that are
            damaged.
        ExportError: for a model that cannot be exported.
    """
    harness.check()
    wait = _Wait(run, watch or 0)
    while watch is not None and not (run / CONFIG_FILE).is_file() and wait.for_next(say):
        pass
    _check_run_folder(run, job_arguments)
    job_config = _job_of(run, job_arguments)
    with EvaluationRecord(run, job_config, harness.tasks) as record:
        evaluator = _Evaluator(run, job_arguments, harness, record, say)
        while True:
            steps = _job_of(run, job_arguments).training.steps  # a later launch may extend the run
            evaluator.score_all(steps if last_only else 0)
            newest = max(inventory.complete_steps(evaluator.folder), default=0)
            if watch is None or newest >= steps or not wait.for_next(say):
                break
    if not evaluator.seen:
        raise CheckpointError(
            f"{evaluator.folder} has no checkpoint{f' of step {steps}' * last_only}. Train with "
            "checkpoint.enable = true"
        )
    if evaluator.damaged:
        raise CheckpointError("; ".join(evaluator.damaged.values()))


def table_of_run(run: Path, tasks: list[str]) -> list[str]:
    """Return the scores of a run as lines of text: a row for each step, a column for each task."""
    scores = {(e.step, e.task): e.score for e in read_evaluations(run)}
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
        damaged: what is wrong with the checkpoints that could not be read, by their identity.
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
        self.damaged: dict[str, str] = {}

    def score_all(self, from_step: int) -> None:
        """Score all checkpoints that are there, the oldest first, and those that appear meanwhile.

        Args:
            from_step: the first step to score.
        """
        while found := next(self._pending(from_step), None):
            checkpoint, identity, tasks = found
            try:
                self._score(checkpoint, identity, tasks)
            except CheckpointError as error:
                if checkpoint.path.exists():
                    self.damaged[identity] = str(error)
                    self.say(f"{checkpoint.path.name} is skipped: {error}")
                else:
                    self.say(f"{checkpoint.path.name} was deleted before it was scored")

    def _pending(self, from_step: int) -> Iterator[tuple[Checkpoint, str, list[str]]]:
        """Yield checkpoints that are not scored on all tasks, their identity and these tasks."""
        for step in inventory.complete_steps(self.folder):
            if step < from_step:
                continue
            path = inventory.step_folder(self.folder, step)
            try:
                identity = manifests.identity(path)
            except (CheckpointError, OSError):  # deleted in this moment
                continue
            self.seen = True
            tasks = [
                task
                for task in self.harness.tasks
                if not self.record.has(identity, task, self.harness.limit)
            ]
            if tasks and identity not in self.damaged:
                yield Checkpoint(path, step), identity, tasks

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
            if task not in found:
                raise ArgumentError(
                    f"--tasks {task}: the harness has no accuracy for it. Choose a task with the "
                    "metric acc or acc_norm"
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
    """

    def __init__(self, run: Path, hours: float):
        self.run, self.hours = run, hours
        self.last_sign = time.time()
        self.silent = False

    def for_next(self, say: Callable[[str], None]) -> bool:
        """Wait a moment for the next checkpoint; return False if the run counts as dead."""
        written = self.run / CONFIG_FILE, self.run / METRICS_FILE
        times = [path.stat().st_mtime for path in written if path.exists()]
        self.last_sign = max(self.last_sign, *times, 0)
        if time.time() - self.last_sign > 3600 * self.hours:
            say(f"{self.run} has written nothing for {self.hours:g} hours: the wait ends")
            return False
        if not self.silent:
            say("Waiting for the next checkpoint")
            self.silent = True
        time.sleep(POLL_SECONDS)
        return True


def _check_run_folder(run: Path, job_arguments: list[str]) -> None:
    has_job = any(argument.startswith("--job.config_file") for argument in job_arguments)
    if not run.is_dir() or not (has_job or (run / CONFIG_FILE).is_file()):
        raise ArgumentError(
            f"{run}: must be a run folder with {CONFIG_FILE} to score all its checkpoints. For a "
            "run of TorchTitan's own trainer, give the job with --job.config_file"
        )


def _job_of(run: Path, job_arguments: list[str]) -> JobConfig:
    return read_job(inventory.checkpoints_of(run) / "any", job_arguments)
