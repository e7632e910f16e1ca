"""Check the data of a job, from its config and files alone."""

import re
from pathlib import Path

import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, build_text_dataloader

from ..config.job_config import text_dataset_section, token_shards_section
from ..config.layout import global_batch_size
from ..config.sections import TextDataset
from ..core import Schedule
from ..data.errors import DataError
from ..data.shards.loader import DATASET, is_token_shards, open_mixture, open_shards
from ..data.shards.mixture import Mixture
from ..data.shards.token_shards import ShardError
from ..data.text.datasets import OURS, is_ours, loader_of
from ..data.text.files import check_documents, data_files
from ..errors import ConfigError
from .loading import check_keys_of_shards, check_workers

_UPSTREAMS = ("c4", "c4_test", "c4_validation")  # TorchTitan's own datasets
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # name or owner/name


def check_data(
    job_config: JobConfig, schedule: Schedule, tokenizer: BaseTokenizer | None, dp_degree: int
) -> Mixture | None:
    """Check that the data of training and validation can be read.

    Args:
        job_config: config of the job.
        schedule: the job's schedule.
        tokenizer: the job's tokenizer; None for a model without one.
        dp_degree: number of data-parallel ranks.

    Returns:
        The mixture of training data if it is token shards; None for text.

    Raises:
        ConfigError: if data is missing, damaged, or does not fit the job.
    """
    _check_loader(job_config, schedule)
    _check_text_key(job_config)
    check_keys_of_shards(job_config)
    if job_config.validation.enable:
        if is_token_shards(job_config.validation):
            _check_validation_shards(job_config, tokenizer, dp_degree)
        else:
            _check_dataset(job_config, "validation")
    if is_token_shards(job_config.training):
        return _check_token_shards(job_config, schedule, tokenizer, dp_degree)
    _check_dataset(job_config, "training")
    return None


def _check_dataset(job_config: JobConfig, section: str) -> None:
    """Check that a text dataset is known and its files are there."""
    config = getattr(job_config, section)
    if config.dataset.lower() not in DATASETS:
        raise ConfigError(
            f"{section}.dataset",
            config.dataset,
            f"must be one of {', '.join([*DATASETS, DATASET])}",
        )
    registered = DATASETS[config.dataset.lower()].path
    path = registered if config.dataset_path is None else config.dataset_path
    if config.dataset.lower() in _UPSTREAMS and Path(path).is_file():
        raise ConfigError(
            f"{section}.dataset_path",
            path,
            f"the dataset {config.dataset} does not read a single file; set {section}.dataset to "
            "jsonl or parquet",
        )
    if _HUB_NAME.fullmatch(registered) and not path.startswith(("/", ".", "~")):
        return  # on the Hugging Face hub, under this name or another
    try:
        if is_ours(config.dataset) and path:
            loader, text_key = loader_of(config.dataset), text_dataset_section(job_config).text_key
            if "://" not in path:
                check_documents(data_files(path, loader.suffixes), loader.read, text_key)
        elif not path or not ("://" in path or Path(path).exists()):
            raise DataError("no such file or folder" if path else "give a file or a folder")
    except DataError as error:
        message = f"{error} (dataset {config.dataset})"
        raise ConfigError(f"{section}.dataset_path", path, message) from None


def _check_text_key(job_config: JobConfig) -> None:
    """Check that a dataset reads ``text_dataset.text_key`` if it is set."""
    text_key = text_dataset_section(job_config).text_key
    if text_key == TextDataset().text_key:
        return
    used = ["training"] + ["validation"] * job_config.validation.enable
    texts = [name for name in used if not is_token_shards(getattr(job_config, name))]
    for name in texts or ["training"]:
        dataset = getattr(job_config, name).dataset
        if not is_ours(dataset):
            raise ConfigError(
                "text_dataset.text_key",
                text_key,
                f"needs a text dataset of this package ({', '.join(OURS)}), but {name}.dataset = "
                f"{dataset!r} does not read this key",
            )


def _check_loader(job_config: JobConfig, schedule: Schedule) -> None:
    """Check that the loaders and their worker processes can resume exactly."""
    spec = train_spec_module.get_train_spec(job_config.model.name)
    if schedule.enabled and spec.build_dataloader_fn is not build_text_dataloader:
        raise ConfigError(
            "model.name",
            job_config.model.name,
            "superposition needs a model with TorchTitan's build_text_dataloader in its train "
            f"spec; this one has {spec.build_dataloader_fn}",
        )
    check_workers(job_config, schedule)


def _check_validation_shards(
    job_config: JobConfig, tokenizer: BaseTokenizer | None, dp_degree: int
) -> None:
    """Check that the token shards of validation open and have enough tokens."""
    section = job_config.validation
    if section.dataset_path is None:
        raise ConfigError("validation.dataset_path", None, "must be a folder of token shards")
    try:
        tokens = open_shards(job_config, section.dataset_path, tokenizer).tokens
    except ShardError as error:
        raise ConfigError("validation.dataset_path", section.dataset_path, str(error)) from error
    needed = dp_degree * section.local_batch_size * (section.seq_len + 1)
    if tokens < needed and section.steps == -1:
        raise ConfigError(
            "validation.dataset_path",
            section.dataset_path,
            f"has {tokens:,} tokens, fewer than the {needed:,} of one batch on all ranks; use more "
            "data or a smaller validation.local_batch_size",
        )


def _check_token_shards(
    job_config: JobConfig, schedule: Schedule, tokenizer: BaseTokenizer | None, dp_degree: int
) -> Mixture:
    """Check that the token shards of training open and have enough tokens for a step."""
    section, path = token_shards_section(job_config), job_config.training.dataset_path
    try:
        mixture = open_mixture(job_config, tokenizer)
    except ShardError as error:
        if section.paths:
            raise ConfigError("token_shards.paths", section.paths, str(error)) from error
        raise ConfigError("training.dataset_path", path, str(error)) from error
    batch_size = global_batch_size(job_config, dp_degree)
    shape = schedule.batch_shape(1, batch_size, job_config.training.seq_len)  # of all ranks
    windows, _ = mixture.take(mixture.start(), shape.sequences, shape.data_tokens + 1)
    if len(windows) < shape.sequences:
        raise ConfigError(
            "token_shards.at_end",
            section.at_end,
            "there are too few tokens for the first step; add data, or set it to 'repeat'",
        )
    return mixture
