"""The paper's figures (arXiv 2605.06546): its runs, and the loss over bag size and step ratio.

``runs.json`` holds the 13 runs of Tables 1 to 3. ``loss_*.csv`` hold Tables 4 to 7, the final
training loss: a row for each r, a column for each s. Cells that are blank in the paper are missing.
"""

import csv
import functools
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

_FOLDER = Path(__file__).parent

# The range of step ratios, and for each model the range of bag sizes, that the paper recommends
GOOD_STEP_RATIOS = (0.2, 0.4)
GOOD_BAG_SIZES = {"270M": (3, 8), "600M": (6, 10), "3B": (6, 6), "10B-A1B": (16, 16)}
PARAMETERS = {
    "270M": 253_954_368,
    "600M": 560_886_720,
    "3B": 3_337_766_912,
    "10B-A1B": 10_103_872_512,
}


@dataclass(frozen=True)
class Run:
    """A run of the paper's Table 1.

    Attributes:
        name: name of its config in ``train_configs/paper``.
        model: flavor of the model.
        method: "baseline", "tst" or "tst_reinit".
        total_steps: steps of both phases.
        superposition_steps: steps in superposition; None for a baseline.
        bag_size: s; None for a baseline.
        total_tokens: data tokens as the paper prints them, such as "105B".
        superposition_tokens: data tokens read in superposition; None for a baseline.
        b200_hours: GPU hours as the paper prints them.
        final_loss: final training loss, nats per token.
        scores: 0-shot accuracy on each benchmark that the paper prints, percent.
    """

    name: str
    model: str
    method: str
    total_steps: int
    superposition_steps: int | None
    bag_size: int | None
    total_tokens: str
    superposition_tokens: str | None
    b200_hours: float
    final_loss: float
    scores: dict[str, float] = field(hash=False)

    @property
    def latents(self) -> int:
        """Positions that the transformer sees in all steps; 2^21 or 2^23 in each step."""
        return self.total_steps * (2**23 if self.model == "10B-A1B" else 2**21)


@functools.cache
def runs() -> dict[str, Run]:
    """Return the runs of Table 1 by name, in the table's order."""
    names = {f.name for f in fields(Run)}
    found = {}
    for entry in json.loads((_FOLDER / "runs.json").read_text()):
        own = {key: entry.pop(key) for key in list(entry) if key in names}
        del entry["kind"]
        scores = {key: score for key, score in entry.items() if score is not None}
        found[own["name"]] = Run(**own, scores=scores)
    return found


@dataclass(frozen=True)
class Surface:
    """The final training loss over step ratio and bag size.

    Attributes:
        model: flavor of the model.
        parameters: number of parameters of the model.
        steps: steps of each run.
        weighting: ``superposition.weighting`` of all runs.
        baseline: loss without superposition; None without such a run.
        losses: loss by (r, s).
    """

    model: str
    parameters: int
    steps: int
    weighting: str
    baseline: float | None
    losses: dict[tuple[float, int], float] = field(hash=False)

    @property
    def title(self) -> str:
        """Model, steps and weighting, for people."""
        return f"{self.model}, {self.steps:,} steps, {self.weighting}"

    @property
    def ratios(self) -> list[float]:
        """The values of r, ascending."""
        return sorted({r for r, _ in self.losses})

    @property
    def bag_sizes(self) -> list[int]:
        """The values of s, ascending."""
        return sorted({s for _, s in self.losses})


@functools.cache
def surfaces() -> list[Surface]:
    """Return the paper's Tables 4 to 7."""
    return [
        _read_surface("loss_270m_20k.csv", "270M", 20_000, "uniform"),
        _read_surface("loss_270m_100k.csv", "270M", 100_000, "uniform"),
        _read_surface("loss_600m_20k.csv", "600M", 20_000, "uniform"),
        _read_surface("loss_600m_20k_power_law.csv", "600M", 20_000, "power_law"),
    ]


def _read_surface(file: str, model: str, steps: int, weighting: str) -> Surface:
    losses: dict[tuple[float, int], float] = {}
    with (_FOLDER / file).open() as lines:
        for row in csv.DictReader(lines):
            r = float(row.pop("r"))
            losses |= {(r, int(s)): float(loss) for s, loss in row.items() if loss}
    return Surface(model, PARAMETERS[model], steps, weighting, losses.pop((0.0, 1)), losses)


def nearest_model(parameters: int) -> str:
    """Return the paper's model whose number of parameters is nearest, as a ratio."""
    return min(PARAMETERS, key=lambda name: abs(math.log(PARAMETERS[name] / parameters)))


def nearest_surface(parameters: int, steps: int, weighting: str) -> Surface:
    """Return the surface that is nearest in weighting, then in parameters, then in steps."""

    def distance(surface: Surface) -> tuple[bool, float, float]:
        return (
            surface.weighting != (weighting if weighting == "power_law" else "uniform"),
            abs(math.log(surface.parameters / parameters)),
            abs(math.log(surface.steps / steps)),
        )

    return min(surfaces(), key=distance)
