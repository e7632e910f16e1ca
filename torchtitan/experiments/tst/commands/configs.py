"""List or copy the job configs that come with the package.

    tst configs list
    tst configs copy .

The configs are the demo's, small ones for debugging, and the paper's runs. "copy" writes them to
FOLDER/train_configs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg, subcommand

from ..shipped import NAME, copy_configs, shipped_configs


@dataclass
class List:
    """List the configs."""


@dataclass
class Copy:
    """Copy the configs, so that you can change and run them."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Parent folder of train_configs."""


def main(
    action: Annotated[List, subcommand("list")] | Annotated[Copy, subcommand("copy")],
) -> None:
    """List or copy the configs.

    Args:
        action: What to do.
    """
    if isinstance(action, Copy):
        print(f"{len(copy_configs(action.folder))} configs are in {action.folder / NAME}")
        return
    for path, purpose in shipped_configs():
        print(f"{NAME}/{path!s:45} {purpose}")
