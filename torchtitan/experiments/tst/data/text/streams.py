"""Text data for all stages and recovery, at any number of ranks.

Upstream's text pipeline, for each data-parallel rank: a share of the documents -> tokens (BOS, EOS)
-> one token buffer -> windows of seq_len + 1 tokens -> batches. Such a pipeline is called a
*stream* here. A run has N of them, as many as it had data-parallel ranks when it began, and every
step takes the same number of windows from each. M ranks cut a step's windows, in the order of the
streams, into M equal parts. With M = N rank n's part is stream n's, which is upstream's run. With
another M the ranks share streams or take several; the step's global batch stays the same, token for
token, and a rank pays for the tokenization of every stream that it has a part in.

The position in the data is the state of every stream at the end of a step. It does not depend on
the number of ranks, of worker processes, or on the length of the windows, so that neither a changed
machine nor a change of the bag size loses a token or repeats one.
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
from ..loader import Batch, PhaseDataloader, StatedBatch
from .dataset import TextDataset
from .files import DataFiles


class StreamsDataloader(PhaseDataloader):
    """From upstream's text datasets.

    Its state is in upstream's form, as if written by N ranks, so that upstream's own trainer goes
    on from it on N ranks.

    Args:
        dp_world_size: M, number of data-parallel ranks.
        dp_rank: of this process.
        tokenizer: for the documents.
        job_config: of the run.

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
        """Read ``count`` streams, from their beginning."""
        self.dataset.open(count)
        self._state = self.dataset.state()

    @property
    def files(self) -> DataFiles | None:
        """That are read; None if the dataset is none of this package."""
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
        # upstream's form has no entry for a stream that is not read here
        states = {n: _unpack(state_dict[f"dp_rank_{n}"]) for n in self.dataset.streams}
        for n, state in states.items():
            self.dataset.streams[n].start_from(state)
        self._state = json.dumps(states)


class _Streams(IterableDataset):
    """This rank's micro-batches (inputs, labels, state); ``state`` ends a step, else None.

    The state travels with the batch, so that it is that of the batches handed out and not of those
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
        windows = global_batch_size(self.job_config, self.ranks)
        if windows % count:
            raise ValueError(
                f"training.global_batch_size = {windows}: the data is in {count} streams, one for "
                "each data-parallel rank at the start of the run, which must divide it"
            )
        first, end = self.rank * count // self.ranks, -(-(self.rank + 1) * count // self.ranks)
        self.count = count
        self.streams = {n: _Stream(self._dataset(n)) for n in range(first, end)}
        if any(_has_shuffle_buffer(data_of(stream.dataset)) for stream in self.streams.values()):
            logger.warning(
                f"training.dataset = {self.job_config.training.dataset!r} streams through a "
                "shuffle buffer, which is not part of its position: the documents in it are lost "
                "at every resume and every change of the bag size. Shuffled beforehand, none "
                "would be"
            )

    def _dataset(self, stream: int) -> TextDataset:
        """What upstream's rank ``stream`` of ``count`` reads."""
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
        """This rank's ``windows`` of ``data_tokens`` for one step; None if the data has run out."""
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
        """State of each stream that is read here, as JSON."""
        return json.dumps({n: stream.state() for n, stream in self.streams.items()})


class _Stream:
    """One of upstream's text datasets, read in windows of any length."""

    def __init__(self, dataset: TextDataset):
        self.dataset = dataset
        self._windows: Iterator[Batch] | None = None
        self._start: dict[str, Any] | None = None

    def start_from(self, state: dict[str, Any]) -> None:
        self.dataset.check_position(state)
        self._windows, self._start = None, state

    def read(self, windows: int, data_tokens: int) -> list[Batch]:
        """The next windows; fewer if the data runs out."""
        if self._windows is None or data_tokens != self.dataset.seq_len:
            if self._windows is not None:
                self._start = self.dataset.state_dict()
            if self._start is not None:
                self.dataset.load_state_dict(self._start)
                if "data" in self._start:  # streaming: its position counts in its epoch only
                    data_of(self.dataset).set_epoch(self._start["data"]["epoch"])
            self.dataset.seq_len = data_tokens
            self._windows, self._start = iter(self.dataset), None
        return list(itertools.islice(self._windows, windows))

    def state(self) -> dict[str, Any]:
        """Plain values. Not a copy: reading on changes them."""
        return self.dataset.state_dict() if self._start is None else self._start


def _has_shuffle_buffer(data: Dataset | HFIterableDataset) -> bool:
    part = getattr(data, "_ex_iterable", None)
    while part is not None:
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        part = getattr(part, "ex_iterable", None)
    return False


class _State(IterableDataset, Stateful):
    """Stands in for a stream where upstream's loader puts its state into a checkpoint's form."""

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
    # a generator of its own: the global one must not move with every checkpoint
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
            f"processes ({error!r}); checkpoint.exclude_from_loading = ['dataloader'] starts the "
            "data anew"
        ) from error
    assert holder.state
    return holder.state
