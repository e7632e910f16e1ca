"""Load text data in every stage, on any number of ranks.

Upstream has one text pipeline for each data-parallel rank: a share of the documents -> tokens (BOS,
EOS) -> a token buffer -> windows of seq_len + 1 tokens -> batches. Such a pipeline is called a
*stream* here. A run has N streams, one for each data-parallel rank that it started with. Every step
reads the same number of windows from each stream.

M ranks split the windows of a step, in the order of the streams, into M equal parts. If M = N, the
part of rank n is stream n, as in upstream. Otherwise, ranks share streams or read several. The
global batch of a step stays the same, token for token. A rank tokenizes every stream that it has a
part of.

The position in the data is the state of every stream at the end of a step. It does not depend on
the number of ranks or worker processes, or on the length of windows. So no token is lost or
repeated if the machine or the bag size changes.
"""

import itertools
import json
import pickle
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset
from datasets import IterableDataset as HFIterableDataset
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger
from typing_extensions import override

from ...config.layout import global_batch_size
from ...config.schedule import build_schedule
from ...resilience.checkpoint.reader import PlainUnpickler
from ...upstream.names import data_of
from ..loader import PhaseDataloader
from ..workers import Batch, StatedBatch
from .dataset import TextDataset
from .files import DataFiles


class StreamsDataloader(PhaseDataloader):
    """The loader of upstream's text datasets for training.

    Its state has upstream's form, as if written by N ranks. So upstream's own trainer can resume
    from it on N ranks.

    Args:
        dp_world_size: M, number of data-parallel ranks.
        dp_rank: data-parallel rank of this process.
        tokenizer: tokenizer of the run.
        job_config: config of the run.

    Raises:
        DataError: from the constructor or :meth:`set_streams`, if the dataset cannot be opened.
        ValueError: from these, if the streams cannot be divided as asked.
    """

    def __init__(
        self, dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
    ):
        super().__init__(job_config)
        self.dataset = _Streams(dp_world_size, dp_rank, tokenizer, job_config)
        self.set_streams(dp_world_size)

    def set_streams(self, count: int) -> None:
        """Read ``count`` streams from their beginning."""
        self.dataset.open(count)
        self._state = self.dataset.state()

    @property
    def files(self) -> DataFiles | None:
        """The files that are read; None if the dataset is not one of this package."""
        return next(iter(self.dataset.streams.values())).dataset.files

    @override
    def begin(self, completed_steps: int) -> None:
        self.dataset.completed_steps = completed_steps

    @override
    def _batches(self) -> Iterable[StatedBatch]:
        return DataLoader(self.dataset, **self.options)

    @override
    def state_dict(self) -> dict[str, Any]:
        states = json.loads(self._state)
        packed: dict[str, Any] = {}
        for stream, state in states.items():
            packed |= _pack(int(stream), self.dataset.count, state)
        return packed

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The state has entries for the streams of this rank only.
        states = {n: _unpack(state_dict[f"dp_rank_{n}"]) for n in self.dataset.streams}
        for n, state in states.items():
            self.dataset.streams[n].start_from(state)
        self._state = json.dumps(states)


class _Streams(IterableDataset):
    """The micro-batches of a rank: inputs, labels, and the state at the end of a step, else None.

    The state travels with the batch. So it counts the batches that were returned, and not those
    that a worker process has read ahead.
    """

    def __init__(
        self, dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
    ):
        self.ranks, self.rank = dp_world_size, dp_rank
        self.tokenizer, self.job_config = tokenizer, job_config
        self.schedule = build_schedule(job_config)
        self.completed_steps = 0

    def open(self, count: int) -> None:
        """Open those of ``count`` streams that this rank reads."""
        windows = global_batch_size(self.job_config, self.ranks)
        if windows % count:
            raise ValueError(
                f"training.global_batch_size = {windows}: must be a multiple of {count}, because "
                f"the data has {count} streams, one for each data-parallel rank at the start of "
                "the run"
            )
        first, end = self.rank * count // self.ranks, -(-(self.rank + 1) * count // self.ranks)
        self.count = count
        self.streams = {n: _Stream(self._dataset(n)) for n in range(first, end)}
        if any(_has_shuffle_buffer(data_of(stream.dataset)) for stream in self.streams.values()):
            logger.warning(
                f"training.dataset = {self.job_config.training.dataset!r} has a shuffle buffer, "
                "which is not saved with its position. The documents in the buffer are lost at "
                "every resume and every change of the bag size. To keep them, shuffle the data "
                "beforehand"
            )

    def _dataset(self, stream: int) -> TextDataset:
        """Return the dataset that upstream's rank ``stream`` of ``count`` would read."""
        return TextDataset(
            "training", stream, self.count, self.tokenizer, self.job_config, infinite=True
        )

    @override
    def __iter__(self) -> Iterator[StatedBatch]:
        training = self.job_config.training
        accumulation = global_batch_size(self.job_config, self.ranks) // (
            training.local_batch_size * self.ranks
        )
        for step in itertools.count(self.completed_steps + 1):
            shape = self.schedule.batch_shape(step, training.local_batch_size, training.seq_len)
            windows = self._read_step(shape.sequences * accumulation, shape.data_tokens)
            if windows is None:
                return
            for end in range(shape.sequences, len(windows) + 1, shape.sequences):
                inputs, labels = default_collate(windows[end - shape.sequences : end])
                yield inputs, labels, self.state() if end == len(windows) else None

    def _read_step(self, windows: int, data_tokens: int) -> list[Batch] | None:
        """Read this rank's ``windows`` of ``data_tokens`` for a step; None if the data ends."""
        first, end = self.rank * windows, (self.rank + 1) * windows
        per_stream = windows * self.ranks // self.count
        part: list[Batch] = []
        for n, stream in self.streams.items():
            read = stream.read(per_stream, data_tokens)
            if len(read) < per_stream:
                return None
            part += read[max(0, first - n * per_stream) : end - n * per_stream]
        return part

    def state(self) -> str:
        """Return the state of each stream that is read here, as JSON."""
        return json.dumps({n: stream.state() for n, stream in self.streams.items()})


class _Stream:
    """One of upstream's text datasets, read in windows of any length."""

    def __init__(self, dataset: TextDataset):
        self.dataset = dataset
        self._windows: Iterator[Batch] | None = None
        self._start: dict[str, Any] | None = None

    def start_from(self, state: dict[str, Any]) -> None:
        """Continue from a state at the next :meth:`read`."""
        self.dataset.check_position(state)
        self._windows, self._start = None, state

    def read(self, windows: int, data_tokens: int) -> list[Batch]:
        """Read the next windows; fewer if the data ends."""
        if self._windows is None or data_tokens != self.dataset.seq_len:
            if self._windows is not None:
                self._start = self.dataset.state_dict()
            if self._start is not None:
                self.dataset.load_state_dict(self._start)
                if "data" in self._start:  # the position of a streaming dataset is within its epoch
                    data_of(self.dataset).set_epoch(self._start["data"]["epoch"])
            self.dataset.seq_len = data_tokens
            self._windows, self._start = iter(self.dataset), None
        return list(itertools.islice(self._windows, windows))

    def state(self) -> dict[str, Any]:
        """Return the state, as plain values; it is not a copy, so :meth:`read` changes it."""
        return self.dataset.state_dict() if self._start is None else self._start


def _has_shuffle_buffer(data: Dataset | HFIterableDataset) -> bool:
    part = getattr(data, "_ex_iterable", None)
    while part is not None:
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        part = getattr(part, "ex_iterable", None)
    return False


class _State(IterableDataset, Stateful):
    """A stand-in for a stream, for upstream's loader to convert a state to a checkpoint's form."""

    def __init__(self, state: dict[str, Any] | None = None):
        self.state = state

    @override
    def __iter__(self) -> Iterator[Batch]:
        yield from ()

    def state_dict(self) -> dict[str, Any]:
        assert self.state is not None
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def _pack(stream: int, count: int, state: dict[str, Any]) -> dict[str, Any]:
    # Use a separate generator: a checkpoint must not advance the global one.
    loader = ParallelAwareDataloader(_State(state), stream, count, generator=torch.Generator())
    return loader.state_dict()


def _unpack(packed: bytes) -> dict[str, Any]:
    holder = _State({})
    loader = StatefulDataLoader(holder, generator=torch.Generator())
    try:
        loader.load_state_dict(PlainUnpickler.loads(packed))
        iter(loader)
    except (AssertionError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            "the checkpoint's position in the data is not one of a text dataset without worker "
            f"processes ({error!r}); set checkpoint.exclude_from_loading = ['dataloader'] to "
            "restart the data from its beginning"
        ) from error
    assert holder.state
    return holder.state
