"""Check that your own implementation does what the paper describes.

    tst conformance conformance_of_my_loop.py

The file describes your implementation by a class TST. Its methods call your code, such as your
training loop. The exit code is 1 if a check fails.
"""

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..core.conformance import InterfaceError, Result, check, load, summary
from ..errors import ArgumentError, in_one_line


def main(file: Annotated[Positional[Path], arg(metavar="FILE")]) -> None:
    """Check an implementation.

    Args:
        file: The Python file with the class TST.
    """
    try:
        results = check(load(file), _show)
    except Exception as error:  # the file's own, too
        text = str(error) if isinstance(error, InterfaceError) else in_one_line(error)
        raise ArgumentError(text if str(file) in text else f"{file}: {text}") from error
    print(summary(results))
    sys.exit(any(result.problem for result in results))


def _show(result: Result) -> None:
    print(result, flush=True)  # some checks take seconds
