"""Ranges and choices of values, for keys whose type allows too much.

The range of a field is in its annotation: ``Annotated[int, at_least(1)]``. The ranges of
TorchTitan's own fields are in :mod:`.upstream_ranges`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """The values that a key may have.

    Attributes:
        has: whether a value of the key's type is allowed.
        text: the allowed values in words, for an error.
    """

    has: Callable[[Any], bool]
    text: str


def at_least(least: int, more: str = "") -> Allowed:
    """Return the range of integers from ``least``; ``more`` explains it in errors."""
    text = f"an integer of at least {least}"
    return Allowed(lambda value: value >= least, f"{text} ({more})" if more else text)


def or_minus_1(meaning: str) -> Allowed:
    """Return the range of -1 and the integers from 1; ``meaning`` says what -1 does."""
    return Allowed(
        lambda value: value >= 1 or value == -1, f"an integer of at least 1, or -1 {meaning}"
    )


def share(text: str, one: bool = True) -> Allowed:
    """Return the range from 0 to 1, with or without 1 itself; ``text`` is for errors."""
    return Allowed(lambda value: 0 <= value < 1 or (one and value == 1), text)


def one_of(*choices: str) -> Allowed:
    """Return the range of exactly these choices."""
    return Allowed(lambda value: value in choices, f"one of {', '.join(choices)}")


def each_of(*choices: str) -> Allowed:
    """Return the range of lists that have these choices only."""
    return Allowed(
        lambda values: all(value in choices for value in values), f"a list of {', '.join(choices)}"
    )


def of_each_stage(allowed: Allowed) -> Allowed:
    """Return the range of one value for all stages of superposition, or a list with one each."""
    return Allowed(
        lambda value: all(map(allowed.has, value if isinstance(value, list) else [value])),
        f"{allowed.text}; or a list of them, one for each bag size",
    )


ABOVE_0 = Allowed(lambda value: 0 < value < math.inf, "a finite number above 0")
BAG_SIZES = Allowed(
    lambda value: bool(value) and min(value) >= 2 if isinstance(value, list) else value >= 1,
    "an integer of at least 1 (1 switches superposition off); or a list of integers of at least 2, "
    "one for each stage",
)
WEIGHTS = Allowed(
    lambda weights: all(0 < weight < math.inf for weight in weights),
    "a list of finite numbers above 0",
)
