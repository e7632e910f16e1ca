"""Streaming text datasets for upstream's registry.

``training.dataset_path`` replaces a dataset by local files: a file, a folder, or a pattern.

The names and fields are those of the Hugging Face hub in 2026. Only the text of a record is read.
The other fields differ between files, and ``datasets`` would refuse that. Examples are DCLM's
``metadata``, and ``date`` in some of FineWeb-Edu's dumps.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from datasets import IterableDataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from ..errors import DataError
from .files import JSONL, DataFiles, data_files
from .records import PARQUET, TEXT_KEY, Document, read_json_lines, read_parquet


@dataclasses.dataclass(frozen=True)
class Loader:
    """A ``DatasetConfig.loader`` of text files, which are split over ranks and workers."""

    suffixes: tuple[str, ...]
    """Suffixes of the files to read in a folder."""

    read: Callable[[str, str], Iterator[Document]]
    """Function that reads the documents of a file, given its path and the text key."""

    text_key: str = TEXT_KEY
    """The field of a record that holds the text."""

    opened: list[DataFiles] | None = dataclasses.field(default=None, compare=False)
    """List that collects the files of each dataset that is opened."""

    def __call__(self, path: str) -> IterableDataset:
        """Open a dataset of ``{"text": ...}``.

        Raises:
            DataError: if there are no files.
        """
        try:
            files = data_files(path, self.suffixes)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if self.opened is not None:
            self.opened.append(files)
        arguments = {"files": files.read, "read": self.read, "text_key": self.text_key}
        return IterableDataset.from_generator(_samples, gen_kwargs=arguments)


def _samples(
    files: list[str], read: Callable[[str, str], Iterator[Document]], text_key: str
) -> Iterator[dict[str, str]]:
    for file in files:
        for document in read(file, text_key):
            yield {"text": document.text}


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]


def _files(path: str, loader: Loader) -> DatasetConfig:
    return DatasetConfig(path, loader, _text)


_JSONL, _PARQUET = Loader(JSONL, read_json_lines), Loader(PARQUET, read_parquet)
_DCLM = "hf://datasets/mlfoundations/dclm-baseline-1.0"
_FINEWEB_EDU = "hf://datasets/HuggingFaceFW/fineweb-edu"

# Upstream has c4 (allenai/c4, en), c4_validation and c4_test.
OURS = {
    "jsonl": _files("", _JSONL),
    "parquet": _files("", _PARQUET),
    "dclm": _files(f"{_DCLM}/global-shard_*/local-shard_*/*.jsonl.zst", _JSONL),
    "fineweb_edu": _files(f"{_FINEWEB_EDU}/data/*/*.parquet", _PARQUET),
    "fineweb_edu_10bt": _files(f"{_FINEWEB_EDU}/sample/10BT/*.parquet", _PARQUET),
    "fineweb_edu_100bt": _files(f"{_FINEWEB_EDU}/sample/100BT/*.parquet", _PARQUET),
    "fineweb_edu_350bt": _files(f"{_FINEWEB_EDU}/sample/350BT/*.parquet", _PARQUET),
}


def register() -> None:
    """Add the datasets to TorchTitan's registry; names that a user has registered are kept."""
    DATASETS.update({name: config for name, config in OURS.items() if name not in DATASETS})


def is_ours(dataset: str) -> bool:
    """Return whether a name is one of this module's datasets, not one that a user registered."""
    name = dataset.lower()
    return name in OURS and DATASETS.get(name) is OURS[name]


def loader_of(dataset: str) -> Loader:
    """Return the loader of one of this module's datasets."""
    return OURS[dataset.lower()].loader  # type: ignore[return-value]


@contextmanager
def text_key_of(text_key: str) -> Iterator[list[DataFiles]]:
    """Make this module's datasets read another field of their records, inside the context.

    Yields:
        A list that collects the files of each dataset that is opened inside the context.
    """
    opened: list[DataFiles] = []
    ours = {name: config for name, config in OURS.items() if is_ours(name)}
    for name, config in ours.items():
        loader = dataclasses.replace(loader_of(name), text_key=text_key, opened=opened)
        DATASETS[name] = dataclasses.replace(config, loader=loader)
    try:
        yield opened
    finally:
        DATASETS.update(ours)
