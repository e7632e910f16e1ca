"""Group runs that differ only in their seed, and compare two such groups."""

import functools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import t as students_t

from torchtitan.experiments.tst.errors import ArgumentError

from .records import Recipe, Record


@dataclass(frozen=True)
class Lead:
    """How far one recipe ends below another: pairs of runs with the same seed.

    Attributes:
        differences: the other's loss minus this one's, for each seed, in nats.
    """

    differences: dict[int, float]

    @property
    def n(self) -> int:
        """The number of pairs."""
        return len(self.differences)

    @property
    def mean(self) -> float:
        """The mean difference, nats; above 0 if this recipe is better."""
        return statistics.mean(self.differences.values())

    @property
    def standard_error(self) -> float:
        """The standard error of the mean, nats; needs two pairs."""
        return statistics.stdev(self.differences.values()) / self.n**0.5

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the mean by Student's t, nats; needs two pairs."""
        low, high = students_t.interval(0.95, self.n - 1, self.mean, self.standard_error)
        return float(low), float(high)

    @property
    def verdict(self) -> str:
        """Whether this recipe is better: "yes" and "no" where the interval excludes 0."""
        if self.n < 2:
            return f"{self.n} pair" if self.n else "not run"
        low, high = self.interval
        return "yes" if low > 0 else "no" if high < 0 else "not shown"

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.mean:+.3f}" if self.n else ""
        return "{:+.3f} ({:+.3f} to {:+.3f})".format(self.mean, *self.interval)


def mean_lead(leads: Sequence[Lead]) -> Lead:
    """Return the mean of leads on several corpora, seed by seed.

    Seeds are the pairs: two corpora with one seed have the same initial weights.
    """
    seeds = set.intersection(*(set(lead.differences) for lead in leads))
    return Lead({s: statistics.mean(lead.differences[s] for lead in leads) for s in sorted(seeds)})


class Results:
    """All finished runs."""

    def __init__(self, records: Sequence[Record]):
        self.records = records

    @functools.cached_property
    def _by_recipe(self) -> dict[Recipe, dict[int, Record]]:
        found: dict[Recipe, dict[int, Record]] = {}
        for record in self.records:
            known = found.setdefault(record.recipe, {}).setdefault(record.seed, record)
            if known is not record:
                raise ArgumentError(
                    f"{record.run} and {known.run} are the same run: remove one from the CSV files"
                )
        return found

    def recipes(self, **attributes: object) -> list[Recipe]:
        """Return the recipes with these values of their attributes, in the order of their runs."""
        return [
            recipe
            for recipe in self._by_recipe
            if all(getattr(recipe, key) == value for key, value in attributes.items())
        ]

    def runs(self, recipe: Recipe, seeds: Iterable[int] | None = None) -> list[Record]:
        """Return the runs of a recipe in the order of seeds: of all seeds, or of the given ones."""
        by_seed = self._by_recipe.get(recipe, {})
        wanted = sorted(by_seed) if seeds is None else seeds
        return [by_seed[seed] for seed in wanted if seed in by_seed]

    def lead(self, recipe: Recipe, other: Recipe, seeds: Iterable[int]) -> Lead:
        """Return how far a recipe ends below another, over the seeds that both have."""
        mine, others = self._by_recipe.get(recipe, {}), self._by_recipe.get(other, {})
        return Lead({s: others[s].loss - mine[s].loss for s in seeds if s in mine and s in others})


def baseline_of(recipe: Recipe) -> Recipe:
    """Return the equal-FLOPs baseline of a recipe: without superposition, all else equal."""
    return recipe.with_(stages="", mode="full", weighting="uniform", reinit=False, variant="")
