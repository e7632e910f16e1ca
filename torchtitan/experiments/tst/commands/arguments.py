"""Arguments that several commands have, and the arguments of a job on their command lines."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from torchtitan.tools.logging import init_logger
from tyro.conf import Positional, arg

from ..errors import ArgumentError

Job = Annotated[Positional[Path], arg(metavar="JOB.toml", help="The job's TOML file.")]
Model = Annotated[
    Positional[Path],
    arg(metavar="MODEL", help="Checkpoint, exported folder, or run folder (its last checkpoint)."),
]
Ranks = Annotated[
    int | None, arg(metavar="N", help="Number of GPUs. By default as many as the layout needs.")
]

PLOT_SUFFIXES = (".png", ".pdf", ".svg")
GpuKind = Literal["A100", "H100", "H200", "B200"]


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command's own arguments from those of the job, ``--section.key``.

    Values after ``--section.key`` belong to the job, too. What follows ``--section.key=value`` does
    not. Everything after "--" belongs to the job.

    Returns:
        The command's arguments, and the job's.
    """
    own: list[str] = []
    overrides: list[str] = []
    into = own
    for number, argument in enumerate(arguments):
        if argument == "--":
            return own, [*overrides, *arguments[number:]]
        if argument.startswith("--"):
            into = overrides if "." in argument.partition("=")[0] else own
        into.append(argument)
        if argument.startswith("--") and "=" in argument:
            into = own
    return own, overrides


def job_arguments(job: Path, overrides: Sequence[str]) -> list[str]:
    """Return a job's arguments for TorchTitan's config manager.

    Args:
        job: path of the job's TOML.
        overrides: the job's arguments, which override the TOML.

    Raises:
        ArgumentError: if the overrides name another job.
    """
    if named := [argument for argument in overrides if argument.startswith("--job.config")]:
        raise ArgumentError(f"{named[0]}: the job is {job} already; remove this argument")
    return [f"--job.config_file={job}", *overrides]


def check_positive(**options: int | None) -> None:
    """Check that options are at least 1, or None.

    Raises:
        ArgumentError: if an option is below 1; names the option.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise ArgumentError(f"--{name} {value}: must be at least 1")


def log_progress() -> None:
    """Show TorchTitan's log lines on the console, without those of huggingface_hub."""
    init_logger()
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
