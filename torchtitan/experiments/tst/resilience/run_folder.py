"""What a run folder says of its job."""

from pathlib import Path
from typing import Any

import tomli
import tomli_w
from torchtitan.config import JobConfig

from ..errors import ConfigTextError

CONFIG_FILE = "config.toml"  # the resolved config


def write_config(job_config: JobConfig) -> None:
    """Write the resolved config to the run folder, as TOML that starts the same run.

    TOML has no null: keys without a value are left out.
    """
    config = job_config.to_dict()
    del config["job"]["config_file"]
    path = Path(job_config.job.dump_folder, CONFIG_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(_without_none(config)))


def read_config(folder: Path) -> dict[str, Any]:
    """Return the resolved config of a run folder.

    Raises:
        FileNotFoundError: if it has none.
        ConfigTextError: if it is no TOML.
    """
    path = folder / CONFIG_FILE
    try:
        return tomli.loads(path.read_text())
    except ValueError as error:  # also of what is not UTF-8
        raise ConfigTextError(f"{path} is damaged: {error}") from error


def _without_none(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value is not None
    }
