"""Load training data from token shards, on any number of ranks and workers, in every stage.

:mod:`.windows` says which tokens a step reads. The state is the position: how many tokens of each
source the job has read.
"""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.tools.logging import logger
from typing_extensions import override

from ...config.job_config import token_shards_section
from ...config.layout import global_batch_size
from ...config.schedule import build_schedule
from ..loader import PhaseDataloader
from ..workers import Batch, StatedBatch
from .mixture import Mixture, Position
from .once import once_in_launch
from .token_shards import TokenShards
from .windows import Batches, WindowReader, batch_of

DATASET = "token_shards"
_STATE = "token_position"


def is_token_shards(section: Training | Validation) -> bool:
    """Return whether the data of ``[training]`` or ``[validation]`` is token shards."""
    return section.dataset.lower() == DATASET


def open_shards(
    job_config: JobConfig, folder: str | None, tokenizer: BaseTokenizer | None
) -> TokenShards:
    """Open a folder of token shards; in a launch, rank 0 checks its files for all ranks.

    Raises:
        ShardError: if shards are damaged or made with another tokenizer; names the file.
    """
    path = Path(folder or "")
    check = functools.partial(TokenShards, path, tokenizer)
    if job_config.comm.mode != "default":  # one rank runs without the others
        return check()
    of_tokenizer = "the run's tokenizer" if tokenizer else "any tokenizer"
    return once_in_launch(f"token shards in {path} with {of_tokenizer}", check)


def open_mixture(job_config: JobConfig, tokenizer: BaseTokenizer | None) -> Mixture:
    """Open the sources of a job: ``token_shards.paths``, or else ``training.dataset_path``.

    Raises:
        ShardError: as :func:`open_shards`.
    """
    section = token_shards_section(job_config)
    paths = section.paths or [job_config.training.dataset_path]
    sources = [open_shards(job_config, path, tokenizer) for path in paths]
    return Mixture(sources, section.weights, repeat=section.at_end == "repeat")


def tokens_to_read(job_config: JobConfig, dp_degree: int, steps: int) -> int:
    """Return the number of tokens that the first ``steps`` steps read from all sources."""
    training, schedule = job_config.training, build_schedule(job_config)
    batch_size, total = global_batch_size(job_config, dp_degree), 0
    for stage in schedule.until(steps):
        shape = schedule.batch_shape(stage.first, batch_size, training.seq_len)  # of all ranks
        total += stage.steps * shape.sequences * (shape.data_tokens + 1)
    return total


def announce_data(job_config: JobConfig, mixture: Mixture, dp_degree: int) -> None:
    """Log how many tokens the run reads and how many there are; warn if they are too few."""
    steps = job_config.training.steps
    total = tokens_to_read(job_config, dp_degree, steps)
    logger.info(f"Data: the run reads {total:,} tokens")
    for name, source, share in zip(mixture.names, mixture.sources, mixture.shares, strict=True):
        epochs = share * total / source.tokens
        what = f"{share * total:,.0f} from {name}, which has {source.tokens:,}"
        logger.info(f"Data: {what}: {epochs:.2f} epochs")
        if not source.same_tokenizer:
            logger.warning(
                f"{source.folder}: cannot verify that these shards were made with the run's "
                "tokenizer, because they were not written by `tst tokenize` and have no checksum"
            )
        if epochs > 1 and mixture.repeat:
            advice = ". Superposition saves compute by reading more data; with the same data, an "
            advice = f"{advice}ordinary run is better" if build_schedule(job_config).enabled else ""
            logger.warning(f"Not enough data: {what}, read {epochs:.2f} times{advice}")
        elif epochs > 1:
            last = bisect_right(
                range(steps),
                source.tokens,
                key=lambda k: round(share * tokens_to_read(job_config, dp_degree, k)),
            )
            logger.warning(
                f'Not enough data: {what}; with token_shards.at_end = "stop" the run will end '
                f"after about {last - 1} of {steps} steps"
            )


class ShardsDataloader(PhaseDataloader):
    """The loader of token shards for training.

    Args:
        dp_world_size: M, number of data-parallel ranks.
        dp_rank: data-parallel rank of this process.
        tokenizer: tokenizer of the run; the shards must be made with it.
        job_config: config of the run.

    Raises:
        ShardError: from the constructor, as :func:`open_mixture`.
        ValueError: from :meth:`load_state_dict`, for a position in another mixture.
    """

    def __init__(
        self,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer | None,
        job_config: JobConfig,
    ):
        super().__init__(job_config)
        self.mixture = open_mixture(job_config, tokenizer)
        sequences, training = global_batch_size(job_config, dp_world_size), job_config.training
        self.reader = WindowReader(
            self.mixture,
            build_schedule(job_config),
            Batches(sequences, training.local_batch_size, training.seq_len),
            (dp_rank, dp_world_size),
            self.options,
        )
        self.completed_steps = 0
        self._state = self.mixture.start().to_json()

    @property
    def position(self) -> Position:
        """The position after the last step whose batches were all returned."""
        return Position.from_json(self._state)

    def metrics(self) -> dict[str, float]:
        """Return each source's share of the tokens read so far, and how often it was read."""
        read, metrics = self.position.tokens, {}
        for name, source, tokens in zip(
            self.mixture.names, self.mixture.sources, read, strict=True
        ):
            metrics[f"data_share/{name}(%)"] = 100 * tokens / max(1, sum(read))
            metrics[f"data_epochs/{name}"] = tokens / source.tokens
        return metrics

    @override
    def begin(self, completed_steps: int) -> None:
        self.completed_steps = completed_steps

    @override
    def state_dict(self) -> dict[str, Any]:
        return {_STATE: self._state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mixture.check(Position.from_json(state_dict[_STATE]))
        self._state = state_dict[_STATE]

    @override
    def _batches(self) -> Iterable[StatedBatch]:
        return self.reader.batches(self.position, self.completed_steps)


class ShardsValidationDataloader(BaseDataLoader):
    """The loader of token shards for validation: every ``iter()`` starts at the beginning.

    Args:
        dp_world_size: M, number of data-parallel ranks.
        dp_rank: data-parallel rank of this process.
        tokenizer: tokenizer of the run; the shards must be made with it.
        job_config: config of the run.
        infinite: restart at the end; otherwise all ranks stop after the last batch that is whole on
            all of them.

    Raises:
        ShardError: from the constructor, as :func:`open_shards`.
    """

    def __init__(
        self,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer | None,
        job_config: JobConfig,
        infinite: bool,
    ):
        self.ranks, self.rank, self.infinite = dp_world_size, dp_rank, infinite
        self.section = job_config.validation
        self.shards = open_shards(job_config, self.section.dataset_path, tokenizer)

    @override
    def __iter__(self) -> Iterator[Batch]:
        length = self.section.seq_len + 1
        count = self.section.local_batch_size * length  # tokens of a rank's batch
        for start in itertools.count(0, self.ranks * count):
            if start + self.ranks * count > self.shards.tokens and not self.infinite:
                return
            tokens = self.shards.read(start + self.rank * count, count)
            yield batch_of(tokens.reshape(-1, length))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
