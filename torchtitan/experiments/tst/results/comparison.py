"""The paper's three comparisons: loss at equal FLOPs, cost at equal loss, loss at equal data.

Every run with superposition is compared with every baseline. Losses are next-token validation
losses if all runs have them. Otherwise they are training losses: trailing means over 2 % of the
logged steps, and for a run with superposition only those of its recovery. A run ends at its last
such loss.
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
    """Return the FLOPs at a place; the axis of the comparisons at equal cost."""
    return at.flops


def is_at_its_end(step: float, steps: int | None) -> bool:
    """Return whether a step is one of the last of ``steps``; True if their number is unknown."""
    return steps is None or step >= (1 - _SAME) * steps


def are_same(cost: float, other: float) -> bool:
    """Return whether two costs are the same, except for rounding of steps and batches."""
    return abs(cost - other) <= _SAME * min(cost, other)


def comparable_points(run: Curves, kind: str) -> list[Point]:
    """Return the next-token losses of a run; training losses are trailing means.

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
    """Return the loss at ``x``, interpolated linearly; None outside of the points."""
    around = neighbors([axis(point.at) for point in points], x)
    if around is None:
        return None
    before, after = points[around[0]], points[around[1]]
    return before.loss + around[2] * (after.loss - before.loss)


def neighbors(xs: Sequence[float], x: float) -> tuple[int, int, float] | None:
    """Return the indices of the two values around ``x``, and the share of the way between them.

    Both are the index of ``x`` if it is one of the values; None if it is outside of them.

    Args:
        xs: values in ascending order.
        x: the value to find.
    """
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    after = bisect_left(xs, x)
    if xs[after] == x:
        return after, after, 0.0
    return after - 1, after, (x - xs[after - 1]) / (xs[after] - xs[after - 1])


def first_at(points: Sequence[Point], loss: float) -> Place | None:
    """Return the first place with the loss, interpolated linearly; None if it is not reached."""
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
    """The summary of one run.

    Attributes:
        name: name of the run.
        bag_sizes: s of each stage; 1 for a baseline.
        boundary: the last superposition step; 0 for a baseline.
        end: place of its last logged step.
        steps: planned number of steps; None if its config is missing.
        final_loss: the last comparable loss; None if there is none yet.
        bag_loss: training loss over bags at the boundary; None if it is not in nats per token.
        spike: the highest training loss after the boundary minus ``bag_loss``, nats.
        recovery_steps: steps from the boundary until the training loss is back at ``bag_loss``;
            None if it never is.
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
    """The losses of two runs at the same FLOPs or data tokens.

    Attributes:
        at: FLOPs or data tokens; None if one of the two has no comparable loss at all.
        loss: loss of the run with superposition; None if it has no comparable loss there.
        baseline_loss: loss of the baseline; None likewise.
        ended: whether both runs end there, and are at the end of their learning-rate schedules as
            far as their configs tell.
    """

    at: float | None
    loss: float | None
    baseline_loss: float | None
    ended: bool

    @property
    def gain(self) -> float | None:
        """The baseline's loss minus that of the run with superposition, nats."""
        if self.loss is None or self.baseline_loss is None:
            return None
        return self.baseline_loss - self.loss


@dataclass(frozen=True)
class EqualLoss:
    """The cost of two runs for the same loss: the higher one of their final losses.

    Attributes:
        loss: the loss, nats.
        at: place where the run with superposition first reaches it.
        baseline_at: place where the baseline first reaches it.
    """

    loss: float
    at: Place
    baseline_at: Place

    def speed_up(self, axis: Axis) -> float:
        """Return the baseline's cost over the run's, on an axis such as FLOPs, hours or steps."""
        return axis(self.baseline_at) / axis(self.at)


@dataclass(frozen=True)
class Pair:
    """The comparison of a run with superposition and a baseline.

    Attributes:
        run: name of the run with superposition.
        baseline: name of the baseline.
        equal_flops: losses at the FLOPs of the run that spent fewer.
        equal_loss: cost of the same loss; None if one of them has no final loss.
        equal_data: losses at the data tokens of the run that read fewer.
        below_from: place from where on the run stays below the baseline at equal FLOPs, as long as
            both have losses; None if it does not end below.
    """

    run: str
    baseline: str
    equal_flops: EqualCost
    equal_loss: EqualLoss | None
    equal_data: EqualCost
    below_from: Place | None


@dataclass(frozen=True)
class Comparison:
    """The summaries of all runs and the comparisons of all pairs.

    Attributes:
        kind: kind of the losses, "validation" or "training".
        runs: a summary of each run.
        pairs: every run with superposition with every baseline.
    """

    kind: str
    runs: list[Summary]
    pairs: list[Pair]


def compare(runs: Sequence[Curves], kind: str | None = None) -> Comparison:
    """Compare runs in the paper's three ways.

    Args:
        runs: any number of runs; baselines are those without superposition.
        kind: kind of the losses; by default "validation" if all runs have it, else "training".

    Raises:
        ArgumentError: for validation losses that a run does not have.
    """
    if kind == VALIDATION and (without := [run.name for run in runs if not run.validation]):
        raise ArgumentError(
            f"--loss validation: no validation losses in {', '.join(without)}. Use --loss training"
        )
    kind = kind or (VALIDATION if all(run.validation for run in runs) else TRAINING)
    baselines = [run for run in runs if not run.boundary]
    return Comparison(
        kind,
        [summarize(run, kind) for run in runs],
        [compare_pair(run, b, kind) for run in runs if run.boundary for b in baselines],
    )


def summarize(run: Curves, kind: str) -> Summary:
    """Return the summary of a run."""
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
    """Compare a run with superposition with a baseline."""
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
    if are_same(*ends):  # a difference by rounding needs no interpolation
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
            if above:  # interpolate linearly between the two
                crossing = above[0] + (x - above[0]) * -above[1] / (gain - above[1])
    return None if crossing is None else place_at(run.training, crossing, flops)
