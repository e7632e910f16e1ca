"""The loaders of token shards for TorchTitan 0.3; the tokens of a step are those of 0.2.2.

A window has no documents: attention sees all of it, and positions count from its beginning.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torchtitan.components.dataloader import BaseDataLoader, ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from typing_extensions import override

from ..core import Schedule
from ..data.shards.mixture import Mixture, Position
from ..data.shards.token_shards import TokenShards
from ..data.shards.windows import Batches, WindowReader, batch_of
from ..data.workers import Batch, loader_options

_STATE = "token_position"
_WORKERS = ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor")


class ShardsDataLoader(BaseDataLoader):
    """The loader of token shards for training; it follows the bag size of each step.

    Its state is the position of the whole job, so any number of ranks can resume from it.

    Args:
        config: its config.
        dp_world_size: number of data-parallel ranks.
        dp_rank: data-parallel rank of this process.
        tokenizer: tokenizer of the run; the shards must be made with it.
        seq_len: L, tokens of an ordinary sequence.
        local_batch_size: sequences of an ordinary micro-batch.

    Raises:
        ShardError: if shards are damaged or made with another tokenizer; names the file.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        """The sources, and the worker processes that read them."""

        paths: list[str] = field(default_factory=list)
        """Folders of token shards."""

        weights: list[float] = field(default_factory=list)
        """The part of the tokens that each source gets; empty: its number of tokens."""

        at_end: Literal["repeat", "stop"] = "repeat"
        """What happens when a source has no tokens left."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        **kwargs: Any,
    ):
        sources = [TokenShards(path, tokenizer) for path in config.paths]
        self.mixture = Mixture(sources, config.weights, repeat=config.at_end == "repeat")
        self.rank = (dp_rank, dp_world_size)
        self.batch = (local_batch_size, seq_len)
        self.options = loader_options({name: getattr(config, name) for name in _WORKERS})
        self._state = self.mixture.start().to_json()
        self.begin(Schedule(), 1, 0)

    def begin(self, schedule: Schedule, accumulation: int, completed_steps: int) -> None:
        """Make the next ``iter()`` start with the batches of step ``completed_steps + 1``.

        Args:
            schedule: phase and bag size of each step.
            accumulation: micro-batches of a step on each rank.
            completed_steps: steps that are done.
        """
        local, seq_len = self.batch
        batches = Batches(local * accumulation * self.rank[1], local, seq_len)
        self.reader = WindowReader(self.mixture, schedule, batches, self.rank, self.options)
        self.completed_steps = completed_steps

    @override
    def __iter__(self) -> Iterator[Batch]:
        position = Position.from_json(self._state)
        for inputs, labels, state in self.reader.batches(position, self.completed_steps):
            self._state = state or self._state
            yield _with_positions(inputs), labels

    @override
    def state_dict(self) -> dict[str, Any]:
        return {_STATE: self._state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mixture.check(Position.from_json(state_dict[_STATE]))
        self._state = state_dict[_STATE]


class ShardsValidationDataLoader(BaseDataLoader):
    """The loader of token shards for validation: every ``iter()`` starts at the beginning.

    The arguments are those of :class:`ShardsDataLoader`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """The source, in ``dataset_path``."""

        infinite: bool = False
        """Restart at the end; otherwise all ranks stop after the same number of batches."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        **kwargs: Any,
    ):
        self.rank, self.ranks, self.infinite = dp_rank, dp_world_size, config.infinite
        self.windows, self.length = local_batch_size, seq_len + 1
        self.shards = TokenShards(config.dataset_path or "", tokenizer)

    @override
    def __iter__(self) -> Iterator[Batch]:
        count = self.windows * self.length  # tokens of a rank's batch
        for start in itertools.count(0, self.ranks * count):
            if start + self.ranks * count > self.shards.tokens and not self.infinite:
                return
            tokens = self.shards.read(start + self.rank * count, count)
            inputs, labels = batch_of(tokens.reshape(-1, self.length))
            yield _with_positions(inputs), labels

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _with_positions(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = inputs["input"]
    return inputs | {"positions": torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()}
