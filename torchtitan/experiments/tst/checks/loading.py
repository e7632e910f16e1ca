"""Check the keys of the loaders of data, with TorchTitan 0.2.2 and 0.3."""

from pathlib import Path
from typing import Any

from ..config.sections import TokenShards
from ..core import Schedule
from ..errors import ConfigError

_DATASET = "token_shards"


def check_keys_of_shards(job_config: Any) -> None:
    """Check that ``[token_shards]`` fits ``[training]``; without token shards, it must be empty.

    Raises:
        ConfigError: if keys do not fit together.
    """
    training = job_config.training
    section = getattr(job_config, _DATASET, TokenShards())  # TorchTitan's own config has none
    if training.dataset.lower() != _DATASET:
        for key, default in vars(TokenShards()).items():
            if (value := getattr(section, key)) != default:
                raise ConfigError(
                    f"token_shards.{key}",
                    value,
                    f'needs training.dataset = "{_DATASET}" (it is {training.dataset!r})',
                )
        return
    path, folders = training.dataset_path, len(section.paths)
    if bool(section.paths) == (path is not None):
        raise ConfigError(
            "training.dataset_path",
            path,
            f'training.dataset = "{_DATASET}" needs either a folder here, or several in '
            f"token_shards.paths, but not both (token_shards.paths = {section.paths})",
        )
    if len({Path(folder).resolve() for folder in section.paths}) < folders:
        raise ConfigError("token_shards.paths", section.paths, "must be different folders")
    if section.weights and len(section.weights) != folders:
        raise ConfigError(
            "token_shards.weights",
            section.weights,
            f"must have one for each of the {folders} folders in token_shards.paths",
        )


def check_workers(job_config: Any, schedule: Schedule) -> None:
    """Check that the worker processes of loaders can resume exactly.

    Raises:
        ConfigError: if there are too many.
    """
    workers = job_config.training.dataloader.num_workers
    tokenizes = job_config.training.dataset.lower() != _DATASET
    if workers > 1 and schedule.enabled and tokenizes:
        raise ConfigError(
            "training.dataloader.num_workers",
            workers,
            "must be 0 or 1 with superposition, because several workers that tokenize have no "
            "exact position; for more, use token shards (`tst tokenize`)",
        )
    if job_config.validation.enable and (workers := job_config.validation.dataloader.num_workers):
        raise ConfigError(
            "validation.dataloader.num_workers",
            workers,
            "must be 0: each validation reads the same data again, and workers do not restart it "
            "exactly",
        )
