"""Record the scores of a run's checkpoints: in a file, in TensorBoard and in W&B."""

import fcntl
import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torchtitan.components.metrics import LoggerContainer, TensorBoardLogger, WandBLogger
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger
from typing_extensions import override

from ..errors import ArgumentError, in_one_line
from ..metrics_file import DATA_TOKENS, LATENTS, open_lines
from ..resilience.wandb_run import wandb_evaluation
from ..training.tensorboard import DataTokensLogger
from .scores import EVALUATIONS_FILE, Evaluation, read_lines

FOLDER = "evaluation"  # of TensorBoard's files, next to those of the launches


class EvaluationRecord:
    """The file of a run's evaluations, held by one process at a time; a context manager.

    Args:
        run: folder of the run.
        job_config: config of the run, which says whether it logs to TensorBoard and W&B.
        tasks: names of the tasks that are logged.

    Raises:
        ArgumentError: if another process holds it.
    """

    def __init__(self, run: Path, job_config: JobConfig, tasks: list[str]):
        self.run, self.job_config, self.tasks = run, job_config, tasks
        self.loggers: LoggerContainer | None = None
        self.file = open_lines(run / EVALUATIONS_FILE)
        try:
            with suppress(OSError):  # a file system without locks
                _lock(self.file)
        except ArgumentError:
            self.file.close()
            raise
        self.evaluations = read_lines(run)

    def __enter__(self) -> "EvaluationRecord":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.loggers:
            self.loggers.close()
        self.file.close()

    def has(self, checkpoint: str, task: str, limit: int | None) -> bool:
        """Return whether a checkpoint has been scored on a task with a limit of documents."""
        done = (checkpoint, task, limit)
        return any((e.checkpoint, e.task, e.limit) == done for e in self.evaluations)

    def add(self, evaluation: Evaluation) -> None:
        """Log a score where the run logs, and write it to the file.

        The file is last: a score that is not in it is taken again.
        """
        if self.loggers is None:
            self.loggers = self._open_loggers()
        self.loggers.log(_metrics(evaluation), evaluation.step)
        self.file.write(json.dumps(evaluation.to_line()) + "\n")
        self.evaluations.append(evaluation)

    def _open_loggers(self) -> LoggerContainer:
        """Return loggers to TensorBoard and W&B, as far as the run has them."""
        metrics, loggers = self.job_config.metrics, LoggerContainer()
        folder = str(self.run / metrics.save_tb_folder / FOLDER)
        if metrics.enable_wandb:
            try:
                with wandb_evaluation(self.run):
                    loggers.add_logger(_WandBLogger(folder, self.job_config))
            except Exception as error:  # as in training: no package, no network
                logger.warning(f"Scores are not logged to W&B: {in_one_line(error)}")
        if metrics.enable_tensorboard:
            tensorboard = _TensorBoardLogger(folder)
            names = {_tag(task): f"by_data_tokens/{_tag(task)}" for task in self.tasks}
            loggers.add_logger(DataTokensLogger(tensorboard.writer, names))
            loggers.add_logger(tensorboard)
        return loggers


class _TensorBoardLogger(TensorBoardLogger):
    """Upstream's logger that writes at once: the next score may take an hour."""

    @override
    def log(self, metrics: dict[str, Any], step: int) -> None:
        super().log(metrics, step)
        self.writer.flush()


class _WandBLogger(WandBLogger):
    """Upstream's logger without W&B's own steps, which must not go back.

    A task that is scored later goes back to the first checkpoint.
    """

    @override
    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.wandb.define_metric("*", step_metric="step")
        self.wandb.log({"step": step, **metrics})


def _lock(file: Any) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ArgumentError(
            f"{file.name}: another process is scoring this run. Wait for its end, or stop it"
        ) from None


def _tag(task: str) -> str:
    return f"evaluation/{task}(%)"


def _metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Return the metrics of an evaluation by their tags."""
    metrics = {
        _tag(evaluation.task): evaluation.score.value,
        f"evaluation_error/{evaluation.task}(%)": evaluation.score.error,
        DATA_TOKENS: evaluation.data_tokens,
        LATENTS: evaluation.latents,
    }
    return {tag: value for tag, value in metrics.items() if value is not None}
