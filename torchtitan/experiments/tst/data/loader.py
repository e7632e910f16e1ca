"""The base class of the loaders of training data."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import JobConfig
from typing_extensions import override

from .errors import DataError
from .workers import Batch, StatedBatch, loader_options

Section = Literal["training", "validation"]


class PhaseDataloader(BaseDataLoader):
    """A loader whose micro-batches have the shape of the step that they are for.

    Its state travels with the batches. So the state counts the batches that were returned, and not
    those that a worker process or a thread has read ahead.

    Attributes:
        options: arguments for a ``DataLoader`` that returns batches as they are.
    """

    _state: str

    def __init__(self, job_config: JobConfig):
        self.job_config = job_config
        self.options = loader_options(asdict(job_config.training.dataloader))

    @abstractmethod
    def begin(self, completed_steps: int) -> None:
        """Make the next ``iter()`` start with the batches of step ``completed_steps + 1``."""

    @abstractmethod
    def _batches(self) -> Iterable[StatedBatch]:
        """Return inputs, labels and the state after them; the state is None within a step."""

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
        DataError: for any error inside the context.
    """
    try:
        yield
    except Exception as error:  # the dataset's files or the hub may raise anything
        config = getattr(job_config, section)
        # From a worker process or a thread, the message begins with a traceback.
        cause = "".join(str(error).strip().splitlines()[-1:])
        if not isinstance(error, DataError):
            cause = f"{type(error).__name__}: {cause}"
        raise DataError(
            f"{section}.dataset = {config.dataset!r} ({section}.dataset_path = "
            f"{config.dataset_path!r}) cannot be read: {cause}"
        ) from error
