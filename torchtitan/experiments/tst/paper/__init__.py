"""The paper's figures (arXiv 2605.06546): its runs, and losses and scores over r and s.

``runs.json`` holds the 13 runs of Tables 1 to 3. ``loss_*.csv`` hold Tables 4 to 7, the final
training losses, and ``evals_*.csv`` hold Tables 8 to 28, the downstream scores as fractions. They
have a row for each r and a column for each s. Cells that are blank in the paper are blank here.
"""

import functools
import json
from dataclasses import dataclass, field, fields

from .surface import (
    BASELINE_CELL,
    FOLDER,
    PARAMETERS,
    SCORE_TASKS,
    Cell,
    Surface,
    nearest_model,
    nearest_surface,
    score_surfaces,
    surfaces,
)

__all__ = [
    "BASELINE_CELL",
    "GOOD_BAG_SIZES",
    "GOOD_STEP_RATIOS",
    "PARAMETERS",
    "SCORE_TASKS",
    "Cell",
    "Run",
    "Surface",
    "nearest_model",
    "nearest_surface",
    "runs",
    "score_surfaces",
    "surfaces",
]

# The range of step ratios, and for each model the range of bag sizes, that the paper recommends
GOOD_STEP_RATIOS = (0.2, 0.4)
GOOD_BAG_SIZES = {"270M": (3, 8), "600M": (6, 10), "3B": (6, 6), "10B-A1B": (16, 16)}


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
    for entry in json.loads((FOLDER / "runs.json").read_text()):
        own = {key: entry.pop(key) for key in list(entry) if key in names}
        del entry["kind"]
        scores = {key: score for key, score in entry.items() if score is not None}
        found[own["name"]] = Run(**own, scores=scores)
    return found
