"""What two jobs differ in, defaults and command lines applied.

    python scripts/diff_configs.py BASELINE.toml TST.toml
    python scripts/diff_configs.py A.toml --training.steps 100 -- B.toml --superposition.bag_size 8

Exits with 1 if anything differs beyond what is allowed.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

from command_line import documented_parser
from torchtitan.experiments.tst.job_config import SuperpositionConfigManager

# What a baseline and its TST run may differ in
ALLOWED = ("superposition", "job.description", "job.dump_folder")


def flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolve(arguments: list[str]) -> dict[str, Any]:
    """Every value of a job by dotted key.

    Args:
        arguments: the TOML, then overrides as for training.
    """
    job = [f"--job.config_file={arguments[0]}", *arguments[1:]]
    config = dict(flatten(SuperpositionConfigManager().parse_args(job).to_dict()))
    del config["job.config_file"]
    return config


def differences(one: list[str], other: list[str]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both values; see :func:`resolve` for the arguments."""
    first, second = resolve(one), resolve(other)
    return {
        key: (first.get(key), second.get(key))
        for key in {**first, **second}
        if first.get(key) != second.get(key)
    }


def is_allowed(key: str, allowed: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def split_jobs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """At the "--", or two TOML files without overrides."""
    if "--" in arguments:
        at = arguments.index("--")
        jobs = arguments[:at], arguments[at + 1 :]
    else:
        jobs = arguments[:1], arguments[1:]
        if len(arguments) != 2:
            sys.exit("error: give two TOML files, or two jobs with -- between them")
    if any(not job or job[0].startswith("-") for job in jobs):
        sys.exit("error: a job begins with its TOML file")
    return jobs


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "--allow",
        action="append",
        metavar="KEY",
        help="a key, or a whole section, that may differ; several times for several. "
        f"In the place of {', '.join(ALLOWED)}",
    )
    parser.add_argument(
        "jobs", nargs=argparse.REMAINDER, metavar="JOB", help="A [ARGS --] B [ARGS]"
    )
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.CRITICAL)  # torchtitan's: that there is no tokenizer
    allowed = tuple(args.allow or ALLOWED)
    try:
        found = differences(*split_jobs(args.jobs))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for key, values in found.items():
        mark = "" if is_allowed(key, allowed) else "   <- not allowed to differ"
        for sign, value in zip("-+", values, strict=True):
            print(f"{sign} {key} = {json.dumps(value)}{mark}")
    if beyond := [key for key in found if not is_allowed(key, allowed)]:
        sys.exit(f"{len(beyond)} of {len(found)} differences are beyond {', '.join(allowed)}")
    print(f"{len(found)} differences, all of them allowed")


if __name__ == "__main__":
    main()
