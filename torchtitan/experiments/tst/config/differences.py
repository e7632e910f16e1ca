"""The differences of two jobs, with defaults and command lines applied."""

from collections.abc import Iterator
from typing import Any

from .manager import SuperpositionConfigManager

# Keys and sections that may differ between a TST run and its baseline.
ALLOWED = ("superposition", "job.description", "job.dump_folder")


def flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each key of nested sections."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolve(arguments: list[str]) -> dict[str, Any]:
    """Return every value of a job by its dotted key.

    Args:
        arguments: path of the TOML, then overrides as for training.

    Raises:
        ConfigError: for a file or an override that cannot be read.
    """
    job = [f"--job.config_file={arguments[0]}", *arguments[1:]]
    config = dict(flatten(SuperpositionConfigManager().parse_args(job).to_dict()))
    del config["job.config_file"]
    return config


def differences(one: list[str], other: list[str]) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, with both values.

    Args:
        one: arguments of the first job, as for :func:`resolve`.
        other: arguments of the second job.
    """
    first, second = resolve(one), resolve(other)
    return {
        key: (first.get(key), second.get(key))
        for key in {**first, **second}
        if first.get(key) != second.get(key)
    }


def is_allowed(key: str, allowed: tuple[str, ...]) -> bool:
    """Return whether a key may differ, because it or its section is in ``allowed``."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)
