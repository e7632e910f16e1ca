"""The paper's tables over step ratio and bag size: final losses, and downstream scores."""

import csv
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent
PARAMETERS = {
    "270M": 253_954_368,
    "600M": 560_886_720,
    "3B": 3_337_766_912,
    "10B-A1B": 10_103_872_512,
}
# The harness's names of the tasks of Tables 8 to 28
SCORE_TASKS = (
    *("arc_challenge", "arc_easy", "boolq", "hellaswag"),
    *("openbookqa", "piqa", "winogrande"),
)
Cell = tuple[float, int]  # r, s
BASELINE_CELL: Cell = (0.0, 1)


@dataclass(frozen=True)
class Surface:
    """The final losses, or the scores on a task, over step ratio and bag size.

    Attributes:
        model: flavor of the model.
        parameters: number of parameters of the model.
        steps: steps of each run.
        weighting: ``superposition.weighting`` of all runs.
        baseline: value without superposition; None without such a run.
        values: value by (r, s): nats per token, or percent for scores.
        task: the harness's name of the task; None for losses.
        errors: standard error by (r, s), that of the baseline at (0, 1); empty if unknown.
    """

    model: str
    parameters: int
    steps: int
    weighting: str
    baseline: float | None
    values: Mapping[Cell, float] = field(hash=False)
    task: str | None = None
    errors: Mapping[Cell, float] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """Model, steps and weighting, for people."""
        return f"{self.model}, {self.steps:,} steps, {self.weighting}"

    @property
    def quantity(self) -> str:
        """The name of the values with their unit."""
        return "score (%)" if self.task else "final loss (nats per token)"

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value is better, as for scores."""
        return self.task is not None

    @property
    def ratios(self) -> list[float]:
        """The values of r, ascending."""
        return sorted({r for r, _ in self.values})

    @property
    def bag_sizes(self) -> list[int]:
        """The values of s, ascending."""
        return sorted({s for _, s in self.values})

    @property
    def best(self) -> Cell:
        """The r and s of the best value."""
        return (max if self.higher_is_better else min)(self.values, key=self.values.__getitem__)

    def at(self, cell: Cell) -> float | None:
        """Return the value at (r, s), that of the baseline at (0, 1); None without such a run."""
        return self.baseline if cell == BASELINE_CELL else self.values.get(cell)


@functools.cache
def surfaces() -> list[Surface]:
    """Return the final training losses of the paper's Tables 4 to 7."""
    return [
        _read("loss_270m_20k.csv", "270M", 20_000),
        _read("loss_270m_100k.csv", "270M", 100_000),
        _read("loss_600m_20k.csv", "600M", 20_000),
        _read("loss_600m_20k_power_law.csv", "600M", 20_000, "power_law"),
    ]


@functools.cache
def score_surfaces(task: str) -> list[Surface]:
    """Return the scores on one of :data:`SCORE_TASKS` of the paper's Tables 8 to 28."""
    return [
        _read(f"evals_270m_20k_{task}.csv", "270M", 20_000, task=task),
        _read(f"evals_270m_100k_{task}.csv", "270M", 100_000, task=task),
        _read(f"evals_600m_20k_{task}.csv", "600M", 20_000, task=task),
    ]


def _read(
    file: str, model: str, steps: int, weighting: str = "uniform", task: str | None = None
) -> Surface:
    values: dict[Cell, float] = {}
    with (FOLDER / file).open() as lines:
        for row in csv.DictReader(lines):
            r = float(row.pop("r"))
            values |= {(r, int(s)): float(value) for s, value in row.items() if value}
    if task:  # a fraction with four decimals
        values = {cell: round(100 * value, 2) for cell, value in values.items()}
    baseline = values.pop(BASELINE_CELL)
    return Surface(model, PARAMETERS[model], steps, weighting, baseline, values, task)


def nearest_model(parameters: int) -> str:
    """Return the paper's model whose number of parameters is nearest, as a ratio."""
    return min(PARAMETERS, key=lambda name: abs(math.log(PARAMETERS[name] / parameters)))


def nearest_surface(
    parameters: int, steps: int, weighting: str, task: str | None = None
) -> Surface:
    """Return the surface that is nearest in weighting, then in parameters, then in steps.

    Args:
        parameters: number of parameters of the model.
        steps: steps of each run.
        weighting: ``superposition.weighting`` of all runs.
        task: one of :data:`SCORE_TASKS`; None for losses.
    """

    def distance(surface: Surface) -> tuple[bool, float, float]:
        return (
            surface.weighting != (weighting if weighting == "power_law" else "uniform"),
            abs(math.log(surface.parameters / parameters)),
            abs(math.log(surface.steps / steps)),
        )

    return min(score_surfaces(task) if task else surfaces(), key=distance)
