"""The paper's three comparisons: loss at equal FLOPs, cost at equal loss, loss at equal data.

Of every run with superposition against every baseline. Losses are next-token validation losses
where all runs have them, else training losses: of a run with superposition those of its recovery
only, each a trailing mean over 2 % of the logged steps. A run ends where it has its last such loss.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ArgumentError
from .curves import Curves, Place, Point, place_at

VALIDATION, TRAINING = "validation", "training"
Axis = Callable[[Place], float]
_SAME = 0.01  # totals that differ by less than this share are the same


def flops(at: Place) -> float:
    """The axis of the comparisons at equal cost."""
    return at.flops


def is_at_its_end(step: float, steps: int | None) -> bool:
    """Whether ``step`` is one of the last of ``steps``; True where their number is not known."""
    return steps is None or step >= (1 - _SAME) * steps


def comparable_points(run: Curves, kind: str) -> list[Point]:
    """A run's next-token losses; of training a trailing mean.

    Args:
        run: the run.
        kind: "validation" or "training".
    """
    if kind == VALIDATION:
        return [point for point in run.validation if math.isfinite(point.loss)]
    points = [p for p in run.training if p.at.step > run.boundary and math.isfinite(p.loss)]
    window = max(1, len(run.training) // 50)
    means = []
    for last in range(len(points)):
        losses = [point.loss for point in points[max(0, last + 1 - window) : last + 1]]
        means.append(Point(points[last].at, sum(losses) / len(losses)))
    return means


def loss_at(points: Sequence[Point], x: float, axis: Axis) -> float | None:
    """Loss at ``x``, between two points on a straight line; None where the points do not reach."""
    xs = [axis(point.at) for point in points]
    if not points or not xs[0] <= x <= xs[-1]:
        return None
    index = bisect_left(xs, x)
    if xs[index] == x:
        return points[index].loss
    before, after = points[index - 1], points[index]
    share = (x - xs[index - 1]) / (xs[index] - xs[index - 1])
    return before.loss + share * (after.loss - before.loss)


def first_at(points: Sequence[Point], loss: float) -> Place | None:
    """Where the loss is reached first, on a straight line between points; None if nowhere."""
    for index, point in enumerate(points):
        if point.loss <= loss:
            if index == 0:
                return point.at
            before = points[index - 1]
            share = (before.loss - loss) / (before.loss - point.loss)
            return before.at.towards(point.at, share)
    return None


@dataclass(frozen=True)
class Summary:
    """One run.

    Attributes:
        name: of the run.
        bag_sizes: s of each stage; 1 for a baseline.
        boundary: the last superposition step; 0 for a baseline.
        end: of its last logged step.
        steps: that it is to have; None if its config is not there.
        final_loss: the last comparable loss; None if there is none yet.
        bag_loss: training loss at the boundary, over bags; None where it is not in nats per token.
        spike: by how much the highest training loss after the boundary is above it, nats.
        recovery_steps: from the boundary until training loss is back there; None if it never is.
    """

    name: str
    bag_sizes: tuple[int, ...]
    boundary: int
    end: Place
    steps: int | None
    final_loss: float | None
    bag_loss: float | None = None
    spike: float | None = None
    recovery_steps: float | None = None


@dataclass(frozen=True)
class EqualCost:
    """Losses where two runs have spent or read the same.

    Attributes:
        at: FLOPs or data tokens; None if one of the two has no comparable loss at all.
        loss: of the run with superposition; None if it has no comparable loss there.
        baseline_loss: of the baseline.
        ended: whether both runs end there and, as far as configs say, are at the end of their
            learning rates' schedules.
    """

    at: float | None
    loss: float | None
    baseline_loss: float | None
    ended: bool

    @property
    def gain(self) -> float | None:
        """By how much the run with superposition is lower, nats."""
        if self.loss is None or self.baseline_loss is None:
            return None
        return self.baseline_loss - self.loss


@dataclass(frozen=True)
class EqualLoss:
    """What two runs spent for the same loss: the higher of their final ones.

    Attributes:
        loss: nats.
        at: where the run with superposition has it first.
        baseline_at: where the baseline has it first.
    """

    loss: float
    at: Place
    baseline_at: Place

    def speed_up(self, axis: Axis) -> float:
        """Times less on an axis: FLOPs, hours, steps."""
        return axis(self.baseline_at) / axis(self.at)


@dataclass(frozen=True)
class Pair:
    """A run with superposition against a baseline.

    Attributes:
        run: its name.
        baseline: its name.
        equal_flops: losses at the FLOPs of the shorter run.
        equal_loss: cost of the same loss; None if one of them has no final loss.
        equal_data: losses at the data tokens of the run that read fewer.
        below_from: the place of the run from which on it is below the baseline at equal FLOPs, as
            far as both go; None if it does not end below.
    """

    run: str
    baseline: str
    equal_flops: EqualCost
    equal_loss: EqualLoss | None
    equal_data: EqualCost
    below_from: Place | None


@dataclass(frozen=True)
class Comparison:
    """All runs and pairs; ``kind`` is that of the losses, "validation" or "training"."""

    kind: str
    runs: list[Summary]
    pairs: list[Pair]


def compare(runs: Sequence[Curves], kind: str | None = None) -> Comparison:
    """The three comparisons.

    Args:
        runs: of any number; baselines are those without superposition.
        kind: of the losses; by default "validation" if all runs have it, else "training".

    Raises:
        ArgumentError: for validation losses that a run does not have.
    """
    if kind == VALIDATION and (without := [run.name for run in runs if not run.validation]):
        raise ArgumentError(f"--loss validation: {', '.join(without)} has none")
    kind = kind or (VALIDATION if all(run.validation for run in runs) else TRAINING)
    baselines = [run for run in runs if not run.boundary]
    return Comparison(
        kind,
        [summarize(run, kind) for run in runs],
        [compare_pair(run, b, kind) for run in runs if run.boundary for b in baselines],
    )


def summarize(run: Curves, kind: str) -> Summary:
    """What a run came to."""
    points = comparable_points(run, kind)
    final_loss = points[-1].loss if points else None
    summary = Summary(run.name, run.bag_sizes, run.boundary, run.end, run.steps, final_loss)
    after = [p for p in run.training if p.at.step > run.boundary and math.isfinite(p.loss)]
    if not run.boundary or not after or run.loss != "mce":
        return summary
    bag_loss = next(p.loss for p in run.training if p.at.step == run.boundary)
    back = first_at(after, bag_loss)
    return Summary(
        **vars(summary)
        | {
            "bag_loss": bag_loss,
            "spike": max(point.loss for point in after) - bag_loss,
            "recovery_steps": back.step - run.boundary if back else None,
        }
    )


def compare_pair(run: Curves, baseline: Curves, kind: str) -> Pair:
    """The three comparisons of a run with superposition and a baseline."""
    points, of_baseline = (comparable_points(one, kind) for one in (run, baseline))
    return Pair(
        run.name,
        baseline.name,
        _equal_cost(run, baseline, points, of_baseline, flops),
        _equal_loss(points, of_baseline),
        _equal_cost(run, baseline, points, of_baseline, lambda at: at.data_tokens),
        _below_from(run, points, of_baseline),
    )


def _equal_cost(
    run: Curves, baseline: Curves, points: list[Point], of_baseline: list[Point], axis: Axis
) -> EqualCost:
    if not points or not of_baseline:
        return EqualCost(None, None, None, False)
    last, of_other = points[-1], of_baseline[-1]
    ends = axis(last.at), axis(of_other.at)
    at = min(ends)
    if abs(ends[0] - ends[1]) <= _SAME * at:  # do not interpolate for a rounding
        ended = is_at_its_end(last.at.step, run.steps) and is_at_its_end(
            of_other.at.step, baseline.steps
        )
        return EqualCost(at, last.loss, of_other.loss, ended)
    return EqualCost(at, loss_at(points, at, axis), loss_at(of_baseline, at, axis), False)


def _equal_loss(points: list[Point], of_baseline: list[Point]) -> EqualLoss | None:
    if not points or not of_baseline:
        return None
    loss = max(points[-1].loss, of_baseline[-1].loss)
    at, baseline_at = first_at(points, loss), first_at(of_baseline, loss)
    return EqualLoss(loss, at, baseline_at) if at and baseline_at else None


def _below_from(run: Curves, points: list[Point], of_baseline: list[Point]) -> Place | None:
    xs = sorted({flops(point.at) for point in [*points, *of_baseline]})
    above: tuple[float, float] | None = None
    crossing: float | None = None
    for x in xs:
        loss, other = loss_at(points, x, flops), loss_at(of_baseline, x, flops)
        if loss is None or other is None:
            continue
        gain = other - loss
        if gain <= 0:
            above, crossing = (x, gain), None
        elif crossing is None:
            crossing = x
            if above:  # on straight lines between the two
                crossing = above[0] + (x - above[0]) * -above[1] / (gain - above[1])
    return None if crossing is None else place_at(run.training, crossing, flops)
