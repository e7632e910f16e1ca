"""Read and write the runs of docs/results.md as CSV files of runs and of their losses."""

import csv
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from torchtitan.experiments.tst.core import Schedule
from torchtitan.experiments.tst.errors import ArgumentError

RUNS_CSV, CURVES_CSV = "runs.csv", "curves.csv"
DOCS = Path(__file__).parents[2] / "docs"
OUTPUT = DOCS / "results"


def stages_of(schedule: Schedule) -> str:
    """Return the stages of a schedule in the CSV file's form, such as "8x300 4x300"."""
    return " ".join(f"{stage.bag_size}x{stage.steps}" for stage in schedule.stages)


@dataclass(frozen=True)
class Recipe:
    """A recipe: everything that determines a run, except for its seed.

    Attributes:
        corpus: name of the corpus.
        model: flavor of the model.
        lr: peak learning rate.
        stages: bag size and steps of each stage, such as "8x300 4x300"; empty for a baseline.
        mode: ``superposition.mode``.
        weighting: ``superposition.weighting``.
        reinit: whether embedding and LM head were initialised again at the boundary.
        steps: steps of both phases.
        variant: a change of the code that was tried and deleted; docs/experiments.md names it.
    """

    corpus: str
    model: str
    lr: float
    stages: str
    mode: str
    weighting: str
    reinit: bool
    steps: int
    variant: str = ""

    @property
    def bag_sizes(self) -> tuple[int, ...]:
        """The bag size of each stage; none for a baseline."""
        return tuple(size for size, _ in self._stages())

    @property
    def step_ratio(self) -> float:
        """r, the share of the steps in superposition."""
        return round(self.boundary / self.steps, 3)

    @property
    def boundary(self) -> int:
        """The last step in superposition; 0 for a baseline."""
        return sum(steps for _, steps in self._stages())

    @property
    def equal_stages(self) -> bool:
        """Whether all stages have the same number of steps, except for rounding."""
        steps = [steps for _, steps in self._stages()]
        return max(steps) <= min(steps) + 1

    def _stages(self) -> list[tuple[int, int]]:
        pairs = (stage.split("x") for stage in self.stages.split())
        return [(int(size), int(steps)) for size, steps in pairs]

    @property
    def schedule(self) -> str:
        """The recipe's name in tables and plots."""
        if not self.stages:
            return "baseline"
        sizes = ", ".join(map(str, self.bag_sizes))
        name = f"s = {sizes}, r = {self.step_ratio:g}"
        if not self.equal_stages:
            name += f" ({' + '.join(f'{steps / self.steps:g}' for _, steps in self._stages())})"
        if self.mode != "full":
            name += f", bags {'in' if self.mode == 'input' else 'out'} only"
        if self.weighting != "uniform":
            name += f", {self.weighting}"
        if self.reinit:
            name += ", re-initialised"
        return f"{name}, {self.variant}" if self.variant else name

    def with_(self, **changes: Any) -> "Recipe":
        """Return a recipe that differs in some attributes."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Record(Recipe):
    """A finished run.

    Attributes:
        run: sweep, corpus and name.
        seed: seed of weights and data.
        parameters: parameters of the model.
        latents: positions that the transformer saw.
        data_tokens: data tokens read.
        loss: final next-token validation loss, nats per token.
        hours: hours of training.
        corpus_id: checksum of the corpus's tokenizer, and its number of tokens; empty if unknown.
    """

    run: str
    seed: int
    parameters: int
    latents: int
    data_tokens: int
    loss: float
    hours: float
    corpus_id: str = ""

    @property
    def recipe(self) -> Recipe:
        """The run without its seed and its results."""
        return Recipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)})


def read_records(path: Path) -> list[Record]:
    """Read the runs of a CSV file; none if there is no file."""
    kinds: dict[Any, Any] = {bool: lambda text: text == "True"}
    types = {f.name: kinds.get(f.type, f.type) for f in fields(Record)}
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Record(**{key: types[key](value) for key, value in row.items()})
            for row in csv.DictReader(file)
        ]


def read_losses(path: Path) -> dict[str, dict[int, float]]:
    """Read the validation loss of each run by step; none if there is no file."""
    losses: dict[str, dict[int, float]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                losses.setdefault(row["run"], {})[int(row["step"])] = float(row["loss"])
    return losses


def check_corpora(ids: Iterable[tuple[str, str]], output: Path) -> None:
    """Check that a corpus is the same in all runs.

    Args:
        ids: name and ``corpus_id`` of each run's corpus; unknown IDs are not compared.
        output: folder of the CSV files.

    Raises:
        ArgumentError: if a corpus differs.
    """
    known: dict[str, str] = {}
    for corpus, corpus_id in ids:
        if corpus_id and known.setdefault(corpus, corpus_id) != corpus_id:
            raise ArgumentError(
                f"the corpus {corpus!r} is {corpus_id} here (tokenizer, tokens), but "
                f"{known[corpus]} in earlier runs: their losses cannot be compared. Give another "
                f"--folder, and another --output than {output}"
            )


def write(folder: Path, records: Iterable[Record], losses: dict[str, dict[int, float]]) -> None:
    """Write both CSV files, in the order of the runs' names.

    Args:
        folder: where to write; made if it is missing.
        records: the runs.
        losses: validation loss of each run by step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ["run", *(f.name for f in fields(Record) if f.name != "run")]
    records = sorted(records, key=lambda record: record.run)
    with _replacing(folder / CURVES_CSV) as file:
        curves = csv.writer(file, lineterminator="\n")
        curves.writerow(["run", "step", "loss"])
        for record in records:
            curves.writerows([record.run, *point] for point in losses.get(record.run, {}).items())
    with _replacing(folder / RUNS_CSV) as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(map(dataclasses.asdict, records))


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """Open a temporary file that replaces ``path`` when it is complete."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w", newline="") as file:
        yield file
    unfinished.replace(path)
