"""Copy core, the method in plain PyTorch, into your project.

    tst core copy my_project/tst_core

The copy needs torch only, not TorchTitan. It is a package of yours: here you import it as
my_project.tst_core. The licence and the version are in it. Run the command again to update the
copy. It overwrites nothing that you have changed.
"""

import keyword
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..errors import ArgumentError
from ..shipped import LICENSE, ORIGIN, copy_core


def main(
    action: Positional[Literal["copy"]],
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")],
) -> None:
    """Copy core.

    Args:
        action: What to do.
        folder: The new package. Its name must be a Python name.
    """
    name = folder.resolve().name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ArgumentError(
            f"FOLDER {folder}: {name} must be a Python name, such as tst_core, because you import "
            "the folder as a package"
        )
    version, modules = copy_core(folder)
    print(f"{len(modules)} modules of version {version} are in {folder}, with {LICENSE}, {ORIGIN}")
