"""Upstream's text datasets and loaders, with an error if there is nothing to read.

Upstream's own dataset restarts at its end. Without a document it would restart forever.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch.utils.data import get_worker_info
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset
from typing_extensions import override

from ...config.job_config import text_dataset_section
from ..errors import DataError
from ..loader import Section, named_errors
from ..workers import Batch
from .datasets import text_key_of
from .files import DataFiles


class TextDataset(HuggingFaceTextDataset):
    """Upstream's text dataset, for ``[training]`` or ``[validation]``.

    Args:
        section: "training" or "validation".
        share: number of this dataset's share of the documents, from 0.
        shares: number of shares.
        tokenizer: tokenizer of the run.
        job_config: config of the run.
        infinite: restart at the end.

    Raises:
        DataError: if the dataset cannot be opened, or if a whole pass over it has no document.
        ValueError: from :meth:`load_state_dict`, if the position counts something else.

    Attributes:
        files: the files that are read; None if the dataset is not one of this package.
    """

    def __init__(
        self,
        section: Section,
        share: int,
        shares: int,
        tokenizer: BaseTokenizer,
        job_config: JobConfig,
        infinite: bool,
    ):
        config = getattr(job_config, section)
        text_key = text_dataset_section(job_config).text_key
        with named_errors(job_config, section), text_key_of(text_key) as opened:
            try:
                super().__init__(
                    config.dataset,
                    config.dataset_path,
                    tokenizer,
                    config.seq_len,
                    share,
                    shares,
                    infinite,
                )
            except StopIteration:  # from the package datasets, for files without a record
                raise DataError("there is no record in its files") from None
            except IndexError:  # from a dataset in memory
                raise DataError(
                    f"it has fewer documents than the {shares} data-parallel ranks that share them"
                ) from None
        self.files: DataFiles | None = opened[0] if opened else None
        self._name = f"{section}.dataset = {config.dataset!r}"
        self._share = f"part {share + 1} of {shares}" if shares > 1 else "it"
        self._start = copy.deepcopy(self.state_dict())
        self._resumed = False  # whether this pass began in the middle, perhaps at its very end

    @override
    def _get_data_iter(self) -> Iterator[dict[str, Any]]:
        buffer, length = self._token_buffer, len(self._token_buffer)
        yield from super()._get_data_iter()
        # The buffer becomes another list when a window is cut off.
        gave_nothing = self._token_buffer is buffer and len(buffer) == length
        if gave_nothing and not self._resumed:
            worker = get_worker_info()
            of_worker = f", worker {worker.id + 1} of {worker.num_workers}," if worker else ""
            raise DataError(
                f"{self._share}{of_worker} has no document: no record whose text is not empty. "
                "Ranks share the files if the number of files is a multiple of the number of "
                "ranks, otherwise the documents; workers share the files. Remove files without "
                "documents, or change the number of ranks or workers"
            )
        self._resumed = False

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_position(state_dict)
        super().load_state_dict(state_dict)
        self._resumed = state_dict != self._start

    def check_position(self, state_dict: dict[str, Any]) -> None:
        """Check that a position counts the documents of these files.

        Raises:
            ValueError: if it counts something else, such as lines and rows in older versions.
        """
        if self.files is None:
            return
        saved, own = (_kinds(state.get("data", {})) for state in (state_dict, self.state_dict()))
        if saved != own:
            raise ValueError(
                f"{self._name}: the checkpoint's position in the data counts by "
                f"{' of '.join(saved) or 'windows'}, not by {' of '.join(own)}; it comes from "
                "another version of this package or another number of files. Set "
                'checkpoint.exclude_from_loading = ["dataloader"] to restart the data from its '
                "beginning"
            )


def _kinds(state: dict[str, Any] | None) -> list[str]:
    """List what a position of a streaming dataset counts by, from the outside in."""
    kinds = []
    while state := (state or {}).get("examples_iterable"):
        kinds.append(state.get("type", "unknown"))
    return kinds


class TextLoader(ParallelAwareDataloader):
    """Upstream's loader of a section's text dataset, with errors that name the dataset."""

    def __init__(
        self,
        section: Section,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        job_config: JobConfig,
        infinite: bool,
    ):
        config = getattr(job_config, section)
        super().__init__(
            TextDataset(section, dp_rank, dp_world_size, tokenizer, job_config, infinite),
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            **asdict(config.dataloader) | {"batch_size": config.local_batch_size},
        )
        self.section, self.job_config = section, job_config

    @override
    def __iter__(self) -> Iterator[Batch]:
        with named_errors(self.job_config, self.section):
            yield from super().__iter__()
