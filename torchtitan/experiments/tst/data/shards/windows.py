"""Read the windows of each step from a mixture of token shards, on any number of ranks and workers.

    one endless sequence per source -> one order of windows over the sources -> the windows of a
    step, in M equal parts for M data-parallel ranks -> micro-batches -> read ahead

A window is L + 1 tokens, or s * L + 1 in superposition: all except the last are inputs, all except
the first are labels. Position and order belong to the whole job: each rank knows all windows of a
step and reads its part. So any number of ranks and workers reads the same tokens in the same step.
"""

import collections
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from ...core import Schedule
from ..workers import Batch, StatedBatch
from .mixture import Mixture, Position, Window


class Batches(NamedTuple):
    """The batches of ordinary steps.

    Attributes:
        sequences: sequences of a step, on all ranks.
        local: sequences of a micro-batch.
        seq_len: L, tokens of a sequence.
    """

    sequences: int
    local: int
    seq_len: int


class WindowReader:
    """Reads the micro-batches of one rank.

    Args:
        mixture: the sources.
        schedule: phase and bag size of each step.
        batches: the ordinary batches.
        rank: data-parallel rank, and number of data-parallel ranks.
        options: arguments for a ``DataLoader``, from :func:`..workers.loader_options`.
    """

    def __init__(
        self,
        mixture: Mixture,
        schedule: Schedule,
        batches: Batches,
        rank: tuple[int, int],
        options: dict[str, Any],
    ):
        self.mixture, self.schedule, self.options = mixture, schedule, options
        self.ordinary, (self.rank, self.ranks) = batches, rank
        self.accumulation = batches.sequences // (batches.local * self.ranks)

    def batches(self, position: Position, completed_steps: int) -> Iterable[StatedBatch]:
        """Return the micro-batches from a position on.

        Args:
            position: the position after the last step that was read.
            completed_steps: number of that step.

        Returns:
            Inputs (B, L), or (B, s * L) in superposition, their labels, and after the last
            micro-batch of a step the position as JSON.
        """
        orders = self._orders(position, completed_steps)
        batches = DataLoader(_Dataset(self.mixture), sampler=orders, **self.options)  # type: ignore[arg-type]
        # A step uses all its micro-batches at once, so those of the next step are read meanwhile.
        return _read_ahead(iter(batches), max(2, self.accumulation))

    def _orders(self, position: Position, step: int) -> Iterator["_Order"]:
        """Yield what this rank reads after a step, for each micro-batch."""
        while True:
            step += 1
            shape = self.schedule.batch_shape(step, self.ordinary.local, self.ordinary.seq_len)
            length = shape.data_tokens + 1
            mine = shape.sequences * self.accumulation
            windows, position = self.mixture.take(position, mine * self.ranks, length)
            if len(windows) < mine * self.ranks:
                return
            mine_of_all = windows[self.rank * mine : (self.rank + 1) * mine]
            for end in range(shape.sequences, mine + 1, shape.sequences):
                state = position.to_json() if end == mine else None
                yield _Order(mine_of_all[end - shape.sequences : end], length, state)


def _read_ahead(batches: Iterator[StatedBatch], count: int) -> Iterator[StatedBatch]:
    """Yield the same batches, while a thread reads the next ``count`` of them."""
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        ahead = collections.deque(thread.submit(next, batches, None) for _ in range(count))
        try:
            while batch := ahead.popleft().result():
                ahead.append(thread.submit(next, batches, None))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)


class _Order(NamedTuple):
    """The order to read a micro-batch: its windows, and the loader's state after it."""

    windows: list[Window]
    length: int
    state: str | None  # None within a step


class _Dataset(Dataset):
    """A dataset whose index is an :class:`_Order`, so that any process can read any batch."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    @override
    def __getitem__(self, order: _Order) -> StatedBatch:
        return *batch_of(self.mixture.read(order.windows, order.length)), order.state


def batch_of(windows: np.ndarray) -> Batch:
    """Split windows (B, L+1) into inputs (B, L) and their next-token labels (B, L)."""
    tokens = torch.from_numpy(windows)
    return {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()
