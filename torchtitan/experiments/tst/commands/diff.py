"""Show the differences of two jobs, with defaults and command lines applied.

    tst diff BASELINE.toml TST.toml
    tst diff A.toml --training.steps=100 -- B.toml --superposition.bag_size=8

The exit code is 1 if other keys differ than those that may. To give arguments to a job, put --
between the two jobs.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from ..config.differences import ALLOWED, differences, is_allowed
from ..errors import ArgumentError


def main(
    overrides: list[str],
    jobs: Annotated[Positional[tuple[Path, ...]], arg(metavar="JOB.toml", help="The two jobs.")],
    /,
    allow: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY")] = (),
) -> None:
    """Compare two jobs.

    Args:
        overrides: Arguments of the first job, then "--" and the second job.
        jobs: TOML files of the jobs.
        allow: A key or a whole section that may differ.
            Repeat the option for several.
            By default superposition, job.description and
            job.dump_folder.
    """
    first, second = _two(list(map(str, jobs)), overrides)
    allowed = allow or ALLOWED
    found = differences(first, second)
    for key, values in found.items():
        mark = "" if is_allowed(key, allowed) else "   <- not allowed to differ"
        for sign, value in zip("-+", values, strict=True):
            print(f"{sign} {key} = {json.dumps(value)}{mark}")
    if beyond := [key for key in found if not is_allowed(key, allowed)]:
        sys.exit(
            f"{len(beyond)} of {len(found)} differences are not allowed; only {', '.join(allowed)} "
            "may differ"
        )
    print(f"{len(found)} differences, all of them allowed")


def _two(jobs: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments of each of the two jobs, which begin with its TOML."""
    if "--" in overrides:
        at = overrides.index("--")
        found = [*jobs, *overrides[:at]], overrides[at + 1 :]
    elif len(jobs) == 2 and not overrides:
        return jobs[:1], jobs[1:]
    else:
        raise ArgumentError("give two TOML files, or two jobs with -- between them")
    if len(jobs) != 1 or any(not job or job[0].startswith("-") for job in found):
        raise ArgumentError("each job must begin with its TOML file; put -- between the two jobs")
    return found
