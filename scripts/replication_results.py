"""The runs of docs/results.md: as CSV, by variant, as the document's tables."""

import csv
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchtitan.experiments.tst import paper
from torchtitan.experiments.tst.errors import ArgumentError
from torchtitan.experiments.tst.planning.plan import count

RUNS_CSV, CURVES_CSV = "runs.csv", "curves.csv"


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        run: sweep and name.
        bag_size: s; 1 without superposition.
        step_ratio: r; 0 without superposition.
        mode: of superposition.
        reinit: whether embedding and LM head were initialised afresh at the boundary.
        steps: of both phases.
        seed: of weights and data.
        parameters: of the model.
        latents: positions that the transformer saw.
        data_tokens: read.
        loss: final next-token validation loss, nats per token.
        hours: of training.
    """

    run: str
    bag_size: int
    step_ratio: float
    mode: str
    reinit: bool
    steps: int
    seed: int
    parameters: int
    latents: int
    data_tokens: int
    loss: float
    hours: float

    @property
    def variant(self) -> str:
        """What it is called in tables and plots."""
        if self.bag_size == 1:
            return "baseline"
        if self.mode != "full":
            return f"bags {'in' if self.mode == 'input' else 'out'} only, s = {self.bag_size}"
        return f"TST, s = {self.bag_size}" + (", re-initialised" if self.reinit else "")


def read_records(path: Path) -> list[Record]:
    """The runs of a CSV file."""
    kinds: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "str": str,
        "bool": lambda text: text == "True",
    }
    types = {f.name: kinds[getattr(f.type, "__name__", str(f.type))] for f in fields(Record)}
    with path.open(newline="") as file:
        return [
            Record(**{key: types[key](value) for key, value in row.items()})
            for row in csv.DictReader(file)
        ]


def read_losses(path: Path) -> dict[str, dict[int, float]]:
    """Validation loss by step, of each run."""
    losses: dict[str, dict[int, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            losses.setdefault(row["run"], {})[int(row["step"])] = float(row["loss"])
    return losses


class Results:
    """The records, as the tables and plots want them."""

    def __init__(self, records: Sequence[Record]):
        self.records = records
        base = [r for r in records if r.run == "bag_size/baseline,seed=0"]
        if not base:
            raise ArgumentError("the baseline of seed 0 has not been run to its end")
        (self.base,) = base

    def of_seed_0(self) -> list[Record]:
        """Of any number of steps."""
        return [record for record in self.records if record.seed == self.base.seed]

    def variants(self) -> dict[str, list[Record]]:
        """Runs of each variant at r = 0.3, in the order of seeds."""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            if record.steps == self.base.steps and record.step_ratio in (0, 0.3):
                found.setdefault(record.variant, []).append(record)
        return found

    def lead(self, record: Record) -> float:
        """By how much it is below the baseline of its seed and steps, nats."""
        (baseline,) = (
            r
            for r in self.records
            if r.bag_size == 1 and (r.seed, r.steps) == (record.seed, record.steps)
        )
        return baseline.loss - record.loss

    def surface(self) -> paper.Surface:
        """Final loss over r and s, of seed 0."""
        losses = {
            (r.step_ratio, r.bag_size): r.loss
            for r in self.of_seed_0()
            if r.steps == self.base.steps and r.bag_size > 1 and r.mode == "full" and not r.reinit
        }
        base = self.base
        return paper.Surface(
            "demo_small", base.parameters, base.steps, "uniform", base.loss, losses
        )

    def lengths(self) -> list[tuple[Record, Record]]:
        """Baseline and TST with s = 4, r = 0.3 of seed 0, for each number of steps."""
        of: dict[str, dict[int, Record]] = {"baseline": {}, "TST, s = 4": {}}
        for record in self.of_seed_0():
            if record.variant in of and record.step_ratio in (0, 0.3):
                of[record.variant][record.steps] = record
        baselines, runs = of.values()
        return [(baselines[steps], runs[steps]) for steps in sorted(set(baselines) & set(runs))]


def tables(results: Results) -> dict[str, list[list[str]]]:
    """By name; the first row of each is its head."""
    return {
        "variants": _variants_table(results),
        "surface": _surface_table(results.surface()),
        "steps": _steps_table(results),
    }


def _variants_table(results: Results) -> list[list[str]]:
    head = ["run", "data tokens", "mean loss", "standard deviation", "each seed"]
    rows = [[*head, "below the baseline of the same seed by"]]
    for variant, records in results.variants().items():
        losses = [record.loss for record in records]
        leads = [results.lead(record) for record in records]
        rows.append(
            [
                variant,
                count(records[0].data_tokens),
                f"{statistics.mean(losses):.4f}",
                f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "",
                ", ".join(f"{loss:.4f}" for loss in losses),
                ""
                if variant == "baseline"
                else f"{statistics.mean(leads):+.3f} ("
                + ", ".join(f"{lead:+.3f}" for lead in leads)
                + ")",
            ]
        )
    return rows


def _surface_table(surface: paper.Surface) -> list[list[str]]:
    rows = [["*r* \\ *s*", *map(str, surface.bag_sizes)]]
    for r in surface.ratios:
        losses = (surface.losses.get((r, s)) for s in surface.bag_sizes)
        rows.append([f"{r:g}", *("" if loss is None else f"{loss:.4f}" for loss in losses)])
    return rows


def _steps_table(results: Results) -> list[list[str]]:
    rows = [["steps", "latents a parameter", "baseline", "TST, *s* = 4", "below it by"]]
    for baseline, tst in results.lengths():
        rows.append(
            [
                f"{tst.steps:,}",
                f"{tst.latents / tst.parameters:.0f}",
                f"{baseline.loss:.4f}",
                f"{tst.loss:.4f}",
                f"{baseline.loss - tst.loss:+.3f}",
            ]
        )
    return rows


def fill_in(text: str, results: Results) -> str:
    """The document with its tables, each after a line <!-- table: NAME -->, made anew."""
    for name, rows in tables(results).items():
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "| " + " | ".join("---" for _ in rows[0]) + " |")
        marker = f"<!-- table: {name} -->"
        if marker not in text:
            raise ArgumentError(f"no line {marker} in the document")
        text = re.sub(
            rf"{re.escape(marker)}\n(\|.*\n)*",
            lambda _, m=marker, ls=lines: "\n".join([m, *ls, ""]),
            text,
        )
    return text
