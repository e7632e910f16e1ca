"""The record of a job in its run folder and its checkpoints."""

from pathlib import Path
from typing import Any

import tomli
import tomli_w
from torchtitan.config import JobConfig

from ..config.layout import global_batch_size
from ..errors import ConfigTextError

CONFIG_FILE = "config.toml"  # the resolved config


def job_facts(job_config: JobConfig, dp_degree: int) -> dict[str, Any]:
    """Return the values, by key, that a job and the checkpoint it resumes from must agree on.

    Args:
        job_config: the job's config.
        dp_degree: number of data-parallel ranks.
    """
    training, model = job_config.training, job_config.model
    return {
        "training.seq_len": training.seq_len,
        "training.global_batch_size": global_batch_size(job_config, dp_degree),
        "training.dataset": training.dataset,
        "model.name": model.name,
        "model.flavor": model.flavor,
    }


def write_config(job_config: JobConfig) -> None:
    """Write the resolved config to the run folder, as TOML that starts the same run.

    TOML has no null, so keys without a value are skipped.
    """
    config = job_config.to_dict()
    del config["job"]["config_file"]
    path = Path(job_config.job.dump_folder, CONFIG_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{CONFIG_FILE}.unfinished")  # others may be reading the file
    unfinished.write_text(tomli_w.dumps(_without_none(config)))
    unfinished.replace(path)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the resolved config of a run folder.

    Raises:
        FileNotFoundError: if it has no config.
        ConfigTextError: if the file is not valid TOML.
    """
    path = folder / CONFIG_FILE
    try:
        return tomli.loads(path.read_text())
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigTextError(
            f"{path} is damaged: {error}. To write it anew, launch the run again"
        ) from error


def _without_none(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value is not None
    }
