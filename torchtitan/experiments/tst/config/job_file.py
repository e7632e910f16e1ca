"""The file of a job, and its path on the command line."""

import argparse
from pathlib import Path
from typing import Any

import tomli

from ..errors import ConfigError


def read_toml(path: str) -> dict[str, Any]:
    """Return the content of a job's TOML.

    Raises:
        ConfigError: if the file cannot be read, or is not TOML; the error names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return tomli.loads(text)
    except OSError as error:
        raise ConfigError("job.config_file", path, f"{error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError("job.config_file", path, f"is not UTF-8: {error}") from None
    except tomli.TOMLDecodeError as error:
        end = f"at the end, line {len(text.splitlines())}"
        why = str(error).replace("at end of document", end)
        raise ConfigError("job.config_file", path, f"is not TOML: {why}") from None


def option(key: str, args: list[str]) -> str | None:
    """Return the value of a key of ``[job]`` on a command line that is not parsed yet."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = (f"--job.{key}", f"--job.{key.replace('_', '-')}")
    parser.add_argument(*names, dest="given", nargs="?", action="append", default=[])
    return next(iter(parser.parse_known_args(args)[0].given), None)  # the first, as upstream
