"""What the commands share: how a job is named, and how its own arguments are told from theirs."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from torchtitan.tools.logging import init_logger
from tyro.conf import Positional, arg

from ..errors import ArgumentError

Job = Annotated[Positional[Path], arg(metavar="JOB.toml", help="The job.")]
Model = Annotated[
    Positional[Path],
    arg(metavar="MODEL", help="Checkpoint, exported folder, or run folder (its last checkpoint)."),
]
Ranks = Annotated[int | None, arg(metavar="N", help="GPUs. By default those of its layout.")]

PLOT_SUFFIXES = (".png", ".pdf", ".svg")
GpuKind = Literal["A100", "H100", "H200", "B200"]


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command's own arguments from those of the job, ``--section.key``.

    The values that follow ``--section.key`` are the job's too, but not what follows
    ``--section.key=value``. All that follows "--" is the job's.
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
    """Return a job's arguments as TorchTitan takes them.

    Args:
        job: its TOML.
        overrides: over the TOML.

    Raises:
        ArgumentError: for overrides that name another job.
    """
    if named := [argument for argument in overrides if argument.startswith("--job.config")]:
        raise ArgumentError(f"{named[0]}: the job is {job}; name no other")
    return [f"--job.config_file={job}", *overrides]


def check_positive(**options: int | None) -> None:
    """Check that options that are given are at least 1.

    Raises:
        ArgumentError: naming one that is not.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise ArgumentError(f"--{name} {value}: must be at least 1")


def log_progress() -> None:
    """Show TorchTitan's log lines on the console, without those of the hub's library."""
    init_logger()
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
