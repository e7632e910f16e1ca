"""The data of a job on TorchTitan 0.3: its loaders, and a check that they can be opened."""

import dataclasses
from pathlib import Path
from typing import Any

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.tools.logging import logger

from ..data.errors import DataError
from ..data.shards.mixture import Mixture
from ..data.shards.token_shards import ShardError, TokenShards
from ..data.text import datasets
from ..data.text.files import check_documents, data_files
from ..data.tokenizer_identity import entries
from ..errors import ConfigError
from .models import args_of
from .shards import ShardsDataLoader, ShardsValidationDataLoader

SHARDS = "token_shards"


def training_data(job: Any) -> BaseDataLoader.Config:
    """Return the config of the loader for training.

    Raises:
        ConfigError: if there is no such dataset.
    """
    training, section = job.training, job.token_shards
    if training.dataset.lower() == SHARDS:
        return ShardsDataLoader.Config(
            paths=section.paths or [training.dataset_path],
            weights=section.weights,
            at_end=section.at_end,
            **vars(training.dataloader),
        )
    return _text(job, "training", infinite=True)


def validation_data(job: Any) -> BaseDataLoader.Config:
    """Return the config of the loader for validation; the validator decides whether it ends."""
    section = job.validation
    if not section.enable:
        return HuggingFaceTextDataLoader.Config(dataset="c4_validation", infinite=False)
    if section.dataset.lower() == SHARDS:
        return ShardsValidationDataLoader.Config(dataset_path=section.dataset_path)
    return _text(job, "validation", infinite=False)


def _text(job: Any, name: str, infinite: bool) -> BaseDataLoader.Config:
    """Return TorchTitan's loader of text; its datasets are registered in this process."""
    datasets.register()
    section = getattr(job, name)
    dataset = section.dataset.lower()
    if dataset not in DATASETS:
        raise ConfigError(
            f"{name}.dataset", section.dataset, f"must be one of {', '.join([*DATASETS, SHARDS])}"
        )
    if dataset in datasets.OURS:
        ours = datasets.OURS[dataset]
        loader = dataclasses.replace(
            datasets.loader_of(dataset), text_key=job.text_dataset.text_key
        )
        DATASETS[dataset] = dataclasses.replace(ours, loader=loader)
    return HuggingFaceTextDataLoader.Config(
        dataset=dataset,
        dataset_path=section.dataset_path,
        infinite=infinite,
        **vars(section.dataloader),
    )


def warn_of_documents(job: Any) -> None:
    """Log that text is trained on in another way than with TorchTitan 0.2.2."""
    if job.training.dataset.lower() != SHARDS:
        logger.warning(
            f"training.dataset = {job.training.dataset!r}: TorchTitan 0.3 keeps the documents of a "
            "sequence apart, and 0.2.2 does not, so the losses differ. Token shards are read in "
            "the same way by both"
        )


def check_data(job: Any) -> None:
    """Check that the tokenizer fits the model, and that all data can be opened.

    Raises:
        ConfigError: if not; names the key, its value and what is allowed.
    """
    tokenizer = _tokenizer(job)
    for name in ["training"] + ["validation"] * job.validation.enable:
        section = getattr(job, name)
        try:
            if section.dataset.lower() == SHARDS:
                _open_shards(job, name, tokenizer)
            elif section.dataset.lower() in datasets.OURS and section.dataset_path:
                loader = datasets.loader_of(section.dataset)
                if "://" not in section.dataset_path:
                    files = data_files(section.dataset_path, loader.suffixes)
                    check_documents(files, loader.read, job.text_dataset.text_key)
            elif section.dataset_path and not Path(section.dataset_path).exists():
                raise DataError("no such file or folder")
        except (DataError, ShardError) as error:
            key = "token_shards.paths" if name == "training" and job.token_shards.paths else ""
            raise ConfigError(
                key or f"{name}.dataset_path",
                job.token_shards.paths if key else section.dataset_path,
                f"{error} (dataset {section.dataset})",
            ) from None


def _open_shards(job: Any, name: str, tokenizer: BaseTokenizer) -> None:
    if name == "validation":
        TokenShards(Path(job.validation.dataset_path or ""), tokenizer)
        return
    section = job.token_shards
    paths = section.paths or [job.training.dataset_path]
    sources = [TokenShards(Path(path), tokenizer) for path in paths]
    Mixture(sources, section.weights, repeat=section.at_end == "repeat")


def _tokenizer(job: Any) -> BaseTokenizer:
    """Return the tokenizer, which must fit the model."""
    path, flavor = job.model.hf_assets_path, job.model.flavor
    try:
        tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=path)
    except FileNotFoundError as error:
        raise ConfigError("model.hf_assets_path", path, str(error)) from None
    size = args_of(job.model.name, flavor)["vocab_size"]
    if (count := entries(tokenizer)) > size:
        raise ConfigError(
            "model.hf_assets_path",
            path,
            f"its tokenizer has {count:,} entries, more than the {size:,} of "
            f"model.flavor = {flavor!r}; use the model's own tokenizer",
        )
    return tokenizer
