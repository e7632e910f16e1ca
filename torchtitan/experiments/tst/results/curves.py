"""A run's losses over steps, data tokens, latents, FLOPs and hours, from its metrics.

Read from ``metrics.jsonl``, or from TensorBoard's files, which upstream's trainer writes too.

FLOPs are upstream's count (of its MFU). Hours are those of training, summed over launches, without
validation; the first step of a launch holds its start.
"""

import itertools
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..core import Schedule, Stage
from ..errors import UserError
from ..resilience.run_folder import read_config
from ..training.experts import DEAD, ENTROPY, LARGEST, SMALLEST
from ..training.metrics import (
    DATA_TOKENS,
    LATENTS,
    METRICS_FILE,
    SECONDS_PER_STEP,
    TRAINING_LOSS,
    VALIDATION_LOSS,
    read_metrics,
)

_NEEDED = {TRAINING_LOSS, DATA_TOKENS, SECONDS_PER_STEP, "tflops", "throughput(tps)"}


class MetricsError(UserError, ValueError):
    """A folder whose metrics cannot be read or are not enough; the message says why."""


@dataclass(frozen=True)
class Place:
    """How far a run has come.

    Attributes:
        step: of both phases; between two of them where it is interpolated.
        latents: positions that the transformer has seen, on all ranks.
        data_tokens: read so far, on all ranks.
        flops: spent so far, on all ranks.
        hours: of training so far.
    """

    step: float = 0
    latents: float = 0
    data_tokens: float = 0
    flops: float = 0
    hours: float = 0

    def towards(self, other: "Place", share: float) -> "Place":
        """The place that is ``share`` of the way to another one; beyond it above 1."""
        mine, its = vars(self), vars(other)
        return Place(**{name: mine[name] + share * (its[name] - mine[name]) for name in mine})


@dataclass(frozen=True)
class Point:
    """A loss (nats per token) at a place."""

    at: Place
    loss: float


@dataclass(frozen=True)
class ExpertShares:
    """How even the experts of a mixture of experts were in a step.

    Attributes:
        at: the place of the step.
        largest: share of the busiest expert of each layer, in % of the router's choices, by the
            layer's number.
        smallest: of the least busy one.
        entropy: of the shares of the least even layer; 1 where they are equal.
        dead: number of experts of all layers that got nothing.
    """

    at: Place
    largest: dict[int, float]
    smallest: dict[int, float]
    entropy: float
    dead: int


@dataclass(frozen=True)
class Curves:
    """A run.

    Attributes:
        name: of its folder.
        folder: of the run.
        stages: of superposition, as far as it is logged; none if it had no superposition.
        training: the training loss of every logged step, over bags up to the boundary.
        validation: next-token loss in both phases; empty if the run had no validation.
        steps: that the run is to have, by its config; None if there is none to read.
        loss: ``superposition.loss``; in "mce" the training loss is in nats per token.
        experts: of every logged step; empty for a dense model.
    """

    name: str
    folder: Path
    stages: tuple[Stage, ...]
    training: list[Point]
    validation: list[Point]
    steps: int | None = None
    loss: str = "mce"
    experts: tuple[ExpertShares, ...] = ()

    @property
    def boundary(self) -> int:
        """The last logged superposition step; 0 if it had none."""
        return self.stages[-1].last if self.stages else 0

    @property
    def bag_sizes(self) -> tuple[int, ...]:
        """The bag size of each stage; 1 if it had no superposition."""
        return tuple(stage.bag_size for stage in self.stages) or (1,)

    @property
    def end(self) -> Place:
        """Of the last logged step."""
        return self.training[-1].at


def read_runs(folders: Sequence[Path]) -> list[Curves]:
    """Read runs, each with the shortest name that tells it from the others.

    Raises:
        MetricsError: for a folder without metrics, or given twice.
    """
    absolute = [folder.resolve() for folder in folders]
    if len(set(absolute)) < len(absolute):
        raise MetricsError("a run is given twice")
    common = os.path.commonpath([folder.parent for folder in absolute])
    names = [os.path.relpath(folder, common) for folder in absolute]
    return [read_curves(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_curves(folder: str | os.PathLike, name: str | None = None) -> Curves:
    """A run's curves.

    Args:
        folder: a run folder, or one with TensorBoard's event files in or below it.
        name: of the run; by default the folder's.

    Raises:
        MetricsError: if there are no metrics, or none of the start of training.
    """
    folder = Path(folder)
    if (folder / METRICS_FILE).is_file():
        lines, source = read_metrics(folder), METRICS_FILE
    else:
        lines, source = _read_tensorboard(folder), "TensorBoard's files"
    # TensorBoard's files of a run that is going on, or was killed, may end within a step
    logged = [line for line in lines if line.keys() >= _NEEDED]
    if not logged:
        raise MetricsError(f"{folder}: no training in {source} ({', '.join(sorted(_NEEDED))})")
    if (first := logged[0]["step"]) > 1:
        raise MetricsError(
            f"{folder}: begins at step {first}, with tokens and FLOPs of a run before it that are "
            "not in its metrics; a comparison needs whole runs"
        )
    in_superposition = [line for line in logged if line.get("superposition")]
    if in_superposition and LATENTS not in logged[-1]:
        raise MetricsError(f"{folder}: {source} do not say {LATENTS}, but it has superposition")
    config = _read_config(folder)
    training = _add_up(logged)
    return Curves(
        name=name or folder.name,
        folder=folder,
        stages=_stages(in_superposition),
        training=training,
        validation=[
            Point(place_at(training, line["step"], lambda at: at.step), line[VALIDATION_LOSS])
            for line in lines
            if VALIDATION_LOSS in line
        ],
        steps=config.get("training", {}).get("steps"),
        loss=config.get("superposition", {}).get("loss", "mce"),
        experts=tuple(
            ExpertShares(
                at=point.at,
                largest=_by_layer(line, LARGEST),
                smallest=_by_layer(line, SMALLEST),
                entropy=line[ENTROPY],
                dead=round(line[DEAD]),
            )
            for line, point in zip(logged, training, strict=True)
            if LARGEST in line
        ),
    )


def _by_layer(line: dict[str, Any], name: str) -> dict[int, float]:
    start = f"{name}/layer_"
    return {int(key.removeprefix(start)): line[key] for key in line if key.startswith(start)}


def _stages(logged: list[dict[str, Any]]) -> tuple[Stage, ...]:
    """Of the logged steps in superposition; the last step of each stage is always logged."""
    bag_sizes, last_steps = [], []
    for bag_size, lines in itertools.groupby(logged, lambda line: round(line["bag_size"])):
        bag_sizes.append(bag_size)
        last_steps.append([line["step"] for line in lines][-1])
    steps = [last - before for before, last in itertools.pairwise([0, *last_steps])]
    return Schedule.of(bag_sizes, steps).stages


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return read_config(folder)
    except FileNotFoundError:
        return {}


def _add_up(logged: list[dict[str, Any]]) -> list[Point]:
    points, at = [], Place()
    for line in logged:
        latents = line.get(LATENTS, line[DATA_TOKENS])
        flops_per_latent = 1e12 * line["tflops"] / line["throughput(tps)"]
        seconds = line[SECONDS_PER_STEP] * (line["step"] - at.step)
        at = Place(
            step=line["step"],
            latents=latents,
            data_tokens=line[DATA_TOKENS],
            flops=at.flops + flops_per_latent * (latents - at.latents),
            hours=at.hours + seconds / 3600,
        )
        points.append(Point(at, line[TRAINING_LOSS]))
    return points


def place_at(points: list[Point], x: float, axis: Callable[[Place], float]) -> Place:
    """Where a run is at ``x``, from 0, between its points and beyond the last at its last pace."""
    places = [Place(), *(point.at for point in points)]
    after = min(max(1, bisect_left(places, x, key=axis)), len(places) - 1)
    before, after_ = places[after - 1], places[after]
    span = axis(after_) - axis(before)
    return before.towards(after_, (x - axis(before)) / span if span else 1)


def _read_tensorboard(folder: Path) -> list[dict[str, Any]]:
    """Lines as those of metrics.jsonl; a later launch replaces what it went back behind."""
    launches = {
        path.parent
        for depth in ("", "*/", "*/*/")  # the folder of a launch, of all, or of the run
        for path in folder.glob(f"{depth}events.out.tfevents.*")
        if not path.parent.name.startswith("rank_") or path.parent.name == "rank_0"
    }
    if len({launch.parent for launch in launches}) > 1:
        raise MetricsError(f"{folder}: TensorBoard's files of several runs; give one")
    lines: list[dict[str, Any]] = []
    for launch in sorted(launches):
        events = EventAccumulator(os.fspath(launch), size_guidance={"scalars": 0}).Reload()
        by_place: dict[tuple[int, bool], dict[str, Any]] = {}  # step, whether of validation
        for tag in events.Tags()["scalars"]:
            if not tag.startswith("by_data_tokens/"):
                for event in events.Scalars(tag):
                    place = (event.step, tag.startswith("validation_metrics/"))
                    by_place.setdefault(place, {"step": event.step})[tag] = event.value
        of_launch = [
            by_place[place]
            for place in sorted(by_place)
            if {TRAINING_LOSS, VALIDATION_LOSS} & by_place[place].keys()
        ]
        if of_launch:
            lines = [line for line in lines if line["step"] < of_launch[0]["step"]] + of_launch
    if not lines:
        raise MetricsError(f"{folder}: neither {METRICS_FILE} nor TensorBoard's files of a run")
    return lines
