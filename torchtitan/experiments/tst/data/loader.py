"""What the loaders of training data have in common."""

import signal
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import JobConfig
from typing_extensions import override

from ..resilience.stop import STOP_SIGNALS
from .errors import DataError

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
StatedBatch = tuple[dict[str, torch.Tensor], torch.Tensor, str | None]
Section = Literal["training", "validation"]


class PhaseDataloader(BaseDataLoader):
    """Micro-batches shaped for the step that they are of.

    Its state travels with the batches: it is that of the batches handed out, and not of those that
    a worker process or a thread has read ahead.

    Attributes:
        options: for a ``DataLoader`` that hands batches through as they are.
    """

    _state: str

    def __init__(self, job_config: JobConfig):
        self.job_config = job_config
        self.options: dict[str, Any] = asdict(job_config.training.dataloader)
        if not self.options["num_workers"]:
            del self.options["persistent_workers"], self.options["prefetch_factor"]
        self.options |= {"batch_size": None, "worker_init_fn": _leave_signals_to_parent}

    @abstractmethod
    def begin(self, completed_steps: int) -> None:
        """Have the next ``iter()`` start with the batches of step ``completed_steps + 1``."""

    @abstractmethod
    def _batches(self) -> Iterable[StatedBatch]:
        """Inputs, labels and the state after them; no state within a step."""

    @override
    def __iter__(self) -> Iterator[Batch]:
        with named_errors(self.job_config, "training"):
            for inputs, labels, state in self._batches():
                self._state = state or self._state
                yield inputs, labels


@contextmanager
def named_errors(job_config: JobConfig, section: Section) -> Iterator[None]:
    """Add the section's dataset and path to any error in reading its data.

    Raises:
        DataError: for any error.
    """
    try:
        yield
    except Exception as error:  # whatever the dataset's files and hub may raise
        config = getattr(job_config, section)
        # of a worker process or a thread it comes with a traceback before it
        cause = "".join(str(error).strip().splitlines()[-1:])
        if not isinstance(error, DataError):
            cause = f"{type(error).__name__}: {cause}"
        raise DataError(
            f"{section}.dataset = {config.dataset!r} ({section}.dataset_path = "
            f"{config.dataset_path!r}) cannot be read: {cause}"
        ) from error


def _leave_signals_to_parent(worker: int) -> None:
    """Survive what a cluster sends to all processes; a second SIGTERM is the parent's own."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))
