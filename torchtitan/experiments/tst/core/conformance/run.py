"""The entry of the suite: run all checks, and report them."""

import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import parts, training
from .implementation import Implementation, InterfaceError, load
from .suite import Suite, Wrong

_INSTALLED = ("stdlib", "purelib", "platlib")


@dataclass(frozen=True)
class Result:
    """The result of a check.

    Attributes:
        title: what must hold.
        problem: what is wrong and what to do; None if the check passes.
    """

    title: str
    problem: str | None

    def __str__(self) -> str:
        if self.problem is None:
            return f"ok    {self.title}"
        indent = " " * 6
        problem = textwrap.indent(textwrap.fill(self.problem, 94), indent)
        return f"FAIL  {self.title}\n{problem}"


def check(
    make: Callable[[], Implementation], show: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """Run all checks on an implementation.

    Args:
        make: returns a new object of the implementation.
        show: called with each result as soon as it is known.

    Raises:
        InterfaceError: if an attribute of the implementation has a value that the suite cannot use.
    """
    suite, results = Suite(make), []
    for title, function in (parts.CHECKS | training.CHECKS).items():
        problem = None
        try:
            function(suite)
        except Wrong as wrong:
            problem = str(wrong)
        except Exception as error:
            problem = f"{type(error).__name__}: {error} ({_place(error)})"
        results.append(Result(title, problem))
        show(results[-1])
    return results


def _place(error: Exception) -> str:
    """Return where code that is not installed raised an exception, or passed it on."""
    frames = traceback.extract_tb(error.__traceback__)
    installed = (*(sysconfig.get_path(name) for name in _INSTALLED), str(Path(__file__).parent))
    own = [frame for frame in frames if not frame.filename.startswith(installed)]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"


def summary(results: Sequence[Result]) -> str:
    """Return how many checks pass, as a sentence."""
    passed = sum(result.problem is None for result in results)
    return f"{passed} of {len(results)} checks pass."


def main() -> int:
    """Check the implementation in a file; return the exit code."""
    if len(sys.argv) != 2:
        print("usage: python -m PACKAGE.conformance FILE", file=sys.stderr)
        return 2
    try:
        make = load(Path(sys.argv[1]))
        results = check(make, lambda result: print(result, flush=True))
    except InterfaceError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(results))
    return int(any(result.problem for result in results))
