"""Read a run's losses and scores over steps, data tokens, latents, FLOPs and hours.

The metrics are read from ``metrics.jsonl``, or from TensorBoard's files, which upstream's trainer
also writes. The scores of the run's checkpoints are read from ``evaluations.jsonl``.

FLOPs are upstream's count (of its MFU). Hours are those of training, summed over launches, without
validation. The first step of a launch includes its start.
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
from ..expert_metrics import DEAD, ENTROPY, LARGEST, SMALLEST
from ..metrics_file import (
    DATA_TOKENS,
    LATENTS,
    METRICS_FILE,
    SECONDS_PER_STEP,
    TRAINING_LOSS,
    VALIDATION_LOSS,
    read_metrics,
)
from ..resilience.run_folder import read_config
from .scores import Evaluation, read_evaluations

_NEEDED = {TRAINING_LOSS, DATA_TOKENS, SECONDS_PER_STEP, "tflops", "throughput(tps)"}


class MetricsError(UserError, ValueError):
    """A folder whose metrics cannot be read or are not sufficient; the message says why."""


@dataclass(frozen=True)
class Place:
    """The progress of a run.

    Attributes:
        step: steps of both phases so far; not an integer where it is interpolated.
        latents: positions that the transformer has seen so far on all ranks.
        data_tokens: data tokens read so far on all ranks.
        flops: FLOPs spent so far on all ranks.
        hours: hours of training so far.
    """

    step: float = 0
    latents: float = 0
    data_tokens: float = 0
    flops: float = 0
    hours: float = 0

    def towards(self, other: "Place", share: float) -> "Place":
        """Return the place at a share of the way to another one; beyond it for a share above 1."""
        mine, its = vars(self), vars(other)
        return Place(**{name: mine[name] + share * (its[name] - mine[name]) for name in mine})


@dataclass(frozen=True)
class Point:
    """A loss (nats per token) at a place."""

    at: Place
    loss: float


@dataclass(frozen=True)
class ScoredCheckpoint:
    """The score of a checkpoint on a task, at the place of the checkpoint."""

    at: Place
    evaluation: Evaluation


@dataclass(frozen=True)
class ExpertShares:
    """The balance of the experts in a step.

    Attributes:
        at: place of the step.
        largest: share of the busiest expert of each layer, in % of the router's choices, by the
            layer's number.
        smallest: share of the least busy expert of each layer, likewise.
        entropy: entropy of the shares in the least even layer; 1 if they are equal.
        dead: number of experts of all layers that got nothing.
    """

    at: Place
    largest: dict[int, float]
    smallest: dict[int, float]
    entropy: float
    dead: int


@dataclass(frozen=True)
class Curves:
    """The curves of a run.

    Attributes:
        name: name of the run.
        folder: folder of the run.
        stages: stages of superposition, as far as they are logged; none without superposition.
        training: the training loss of every logged step, over bags up to the boundary.
        validation: next-token loss in both phases; empty if the run had no validation.
        steps: planned number of steps, from its config; None without a config.
        loss: ``superposition.loss``; with "mce", the training loss is in nats per token.
        experts: balance of the experts in every logged step; empty for a dense model.
        scores: scores of the checkpoints by step, one for each checkpoint and task; empty if none
            was scored.
    """

    name: str
    folder: Path
    stages: tuple[Stage, ...]
    training: list[Point]
    validation: list[Point]
    steps: int | None = None
    loss: str = "mce"
    experts: tuple[ExpertShares, ...] = ()
    scores: tuple[ScoredCheckpoint, ...] = ()

    @property
    def boundary(self) -> int:
        """The last logged superposition step; 0 without superposition."""
        return self.stages[-1].last if self.stages else 0

    @property
    def bag_sizes(self) -> tuple[int, ...]:
        """The bag size of each stage; 1 without superposition."""
        return tuple(stage.bag_size for stage in self.stages) or (1,)

    @property
    def end(self) -> Place:
        """The place of the last logged step."""
        return self.training[-1].at


def read_runs(folders: Sequence[Path]) -> list[Curves]:
    """Read runs, each with the shortest name that distinguishes it from the others.

    Raises:
        MetricsError: for a folder without metrics, or given twice.
    """
    absolute = [folder.resolve() for folder in folders]
    for number, folder in enumerate(absolute):
        if folder in absolute[:number]:
            raise MetricsError(f"{folders[number]}: a run is given twice. Give each run once")
    common = os.path.commonpath([folder.parent for folder in absolute])
    names = [os.path.relpath(folder, common) for folder in absolute]
    return [read_curves(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_curves(folder: str | os.PathLike, name: str | None = None) -> Curves:
    """Return the curves of a run.

    Args:
        folder: a run folder, or a folder with TensorBoard's event files in or below it.
        name: name of the run; by default that of the folder.

    Raises:
        MetricsError: if there are no metrics, or if they lack the start of training.
    """
    folder = Path(folder)
    if (folder / METRICS_FILE).is_file():
        lines, source = read_metrics(folder), METRICS_FILE
    else:
        lines, source = _read_tensorboard(folder), "TensorBoard's files"
    # TensorBoard's files of a run that is running or was killed may end within a step
    logged = [line for line in lines if line.keys() >= _NEEDED]
    if not logged:
        raise MetricsError(
            f"{folder}: no step of training in {source} has all of {', '.join(sorted(_NEEDED))}"
        )
    if (first := logged[0]["step"]) > 1:
        raise MetricsError(
            f"{folder}: the metrics begin at step {first}, and lack the run before that step. A "
            "comparison needs whole runs: give one with metrics from step 1 on"
        )
    in_superposition = [line for line in logged if line.get("superposition")]
    if in_superposition and LATENTS not in logged[-1]:
        raise MetricsError(f"{folder}: the run has superposition, but {source} lack {LATENTS}")
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
        scores=tuple(
            ScoredCheckpoint(place_at(training, scored.step, lambda at: at.step), scored)
            for scored in read_evaluations(folder)
            if scored.step <= _last_step(training)
        ),
    )


def _last_step(training: list[Point]) -> float:
    """Return the last step that a checkpoint can have; the last steps may not be logged yet.

    A run that went back to an earlier checkpoint still has the scores of later ones.
    """
    before, last = [Place(), *(point.at for point in training)][-2:]
    return last.step + (last.step - before.step)


def _by_layer(line: dict[str, Any], name: str) -> dict[int, float]:
    start = f"{name}/layer_"
    return {int(key.removeprefix(start)): line[key] for key in line if key.startswith(start)}


def _stages(logged: list[dict[str, Any]]) -> tuple[Stage, ...]:
    """Return the stages of the logged steps; the last step of each stage is always logged."""
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
    """Return the place of a run at ``x`` on an axis, interpolated linearly between its points.

    It starts from 0, and extrapolates beyond the last point.
    """
    places = [Place(), *(point.at for point in points)]
    after = min(max(1, bisect_left(places, x, key=axis)), len(places) - 1)
    before, after_ = places[after - 1], places[after]
    span = axis(after_) - axis(before)
    return before.towards(after_, (x - axis(before)) / span if span else 1)


def _read_tensorboard(folder: Path) -> list[dict[str, Any]]:
    """Return lines like those of metrics.jsonl; a later launch replaces the steps it repeats."""
    launches = {
        path.parent
        for depth in ("", "*/", "*/*/")  # the folder of a launch, of all launches, or of the run
        for path in folder.glob(f"{depth}events.out.tfevents.*")
        if not path.parent.name.startswith("rank_") or path.parent.name == "rank_0"
    }
    if len({launch.parent for launch in launches}) > 1:
        raise MetricsError(
            f"{folder}: has TensorBoard's files of several runs. Give the folder of one run"
        )
    lines: list[dict[str, Any]] = []
    for launch in sorted(launches):
        events = EventAccumulator(os.fspath(launch), size_guidance={"scalars": 0}).Reload()
        by_place: dict[tuple[int, bool], dict[str, Any]] = {}  # by step, and whether of validation
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
        raise MetricsError(
            f"{folder}: has neither {METRICS_FILE} nor TensorBoard's files of a run. Give a run "
            "folder"
        )
    return lines
