"""Runs that differ in their seed alone, and differences between two such groups."""

import functools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .records import Recipe, Record

# 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom; a GPU machine may lack scipy
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


@dataclass(frozen=True)
class Lead:
    """By how much one recipe ends below another, seed by seed.

    Attributes:
        differences: loss of the other minus loss of this one, nats, a value for each pair.
    """

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean difference, nats; above 0 if this recipe is better."""
        return statistics.mean(self.differences)

    @property
    def standard_error(self) -> float:
        """The standard error of the mean, nats; of 2 pairs or more."""
        return statistics.stdev(self.differences) / len(self.differences) ** 0.5

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the mean by Student's t; of 2 to 12 pairs."""
        half = _T[len(self.differences) - 2] * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def wins(self) -> int:
        """How many pairs are above 0."""
        return sum(difference > 0 for difference in self.differences)

    def __str__(self) -> str:
        if len(self.differences) < 2:
            return f"{self.mean:+.3f}"
        return "{:+.3f} ({:+.3f} to {:+.3f})".format(self.mean, *self.interval)

    def __add__(self, other: "Lead") -> "Lead":
        return Lead(self.differences + other.differences)


class Results:
    """All finished runs."""

    def __init__(self, records: Sequence[Record]):
        self.records = records

    @functools.cached_property
    def _by_recipe(self) -> dict[Recipe, dict[int, Record]]:
        found: dict[Recipe, dict[int, Record]] = {}
        for record in self.records:
            found.setdefault(record.recipe, {}).setdefault(record.seed, record)
        return found

    def recipes(self, **attributes: object) -> list[Recipe]:
        """Return the recipes with these values of their attributes, in the order of their runs."""
        return [
            recipe
            for recipe in self._by_recipe
            if all(getattr(recipe, key) == value for key, value in attributes.items())
        ]

    def runs(self, recipe: Recipe, seeds: Iterable[int] | None = None) -> list[Record]:
        """Return the runs of a recipe in the order of seeds, all or those that were made."""
        by_seed = self._by_recipe.get(recipe, {})
        wanted = sorted(by_seed) if seeds is None else seeds
        return [by_seed[seed] for seed in wanted if seed in by_seed]

    def lead(self, recipe: Recipe, other: Recipe, seeds: Iterable[int] | None = None) -> Lead:
        """Return by how much a recipe is below another, of the seeds that both have."""
        mine, others = self._by_recipe.get(recipe, {}), self._by_recipe.get(other, {})
        wanted = sorted(mine) if seeds is None else seeds
        return Lead(
            tuple(others[s].loss - mine[s].loss for s in wanted if s in mine and s in others)
        )


def baseline_of(recipe: Recipe) -> Recipe:
    """The equal-FLOPs baseline of a recipe: without superposition, all else equal."""
    return recipe.with_(stages="", mode="full", weighting="uniform", reinit=False)
