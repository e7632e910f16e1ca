"""List or copy the job configs that come with the package.

    tst configs list
    tst configs copy .

They are the demo's, debug ones, and the paper's runs. "copy" makes FOLDER/train_configs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg, subcommand

from ..config.shipped import NAME, copy_configs, shipped_configs


@dataclass
class List:
    """List them."""


@dataclass
class Copy:
    """Copy them, to be changed and run."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Where to make train_configs."""


def main(
    action: Annotated[List, subcommand("list")] | Annotated[Copy, subcommand("copy")],
) -> None:
    """Show the configs.

    Args:
        action: what to do.
    """
    if isinstance(action, Copy):
        print(f"{len(copy_configs(action.folder))} configs are in {action.folder / NAME}")
        return
    for path, purpose in shipped_configs():
        print(f"{NAME}/{path!s:45} {purpose}")
