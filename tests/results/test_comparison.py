"""The three comparisons, on curves whose answers can be worked out by hand."""

from dataclasses import replace

import pytest

from torchtitan.experiments.tst.core import Schedule
from torchtitan.experiments.tst.results.comparison import compare
from torchtitan.experiments.tst.results.curves import Curves, Place, Point


def place(step, s=1, boundary=0):
    """100 latents, 1000 FLOPs and an hour a step."""
    return Place(step, 100 * step, 100 * (step + (s - 1) * min(step, boundary)), 1000 * step, step)


def run(name, validation, training=None, s=1, boundary=0):
    def points(losses):
        return [Point(place(step, s, boundary), loss) for step, loss in losses.items()]

    training = training or {boundary or 10: 5.0, 100: 3.0}
    stages = Schedule.of([s], [boundary]).stages if s > 1 else ()
    return Curves(name, None, stages, points(training), points(validation))


BASELINE = run("baseline", {0: 7, 50: 4, 100: 3}, {10: 5, 100: 3})


def flops(at):
    return at.flops


def test_a_run_that_ends_lower():
    tst = run("tst", {0: 7, 20: 6, 60: 3.8, 80: 3.2, 100: 2.6}, {20: 5, 100: 3}, s=4, boundary=20)
    comparison = compare([BASELINE, tst])
    assert comparison.kind == "validation"
    (pair,) = comparison.pairs
    assert (pair.equal_flops.at, pair.equal_flops.ended) == (100_000, True)
    assert pair.equal_flops.gain == pytest.approx(0.4)
    # 3.0 is a third of the way from step 80 (3.2) to step 100 (2.6)
    assert pair.equal_loss.loss == 3
    assert pair.equal_loss.at.step == pytest.approx(80 + 20 / 3)
    assert pair.equal_loss.speed_up(flops) == pytest.approx(100 / (80 + 20 / 3))
    # the baseline ends at 10,000 data tokens, which the run has read after 40 steps
    assert (pair.equal_data.at, pair.equal_data.ended) == (10_000, False)
    assert (pair.equal_data.loss, pair.equal_data.baseline_loss) == (pytest.approx(4.9), 3)
    # at step 50 it is 0.35 above (4.35), at step 60 level (3.8)
    assert pair.below_from.step == pytest.approx(60)
    summary = comparison.runs[1]
    assert (summary.end.data_tokens, summary.final_loss) == (100 * (4 * 20 + 80), 2.6)


def test_a_baseline_that_ends_lower():
    tst = run("tst", {20: 6, 100: 3.5}, {20: 5, 100: 3}, s=4, boundary=20)
    (pair,) = compare([tst, BASELINE]).pairs
    assert pair.equal_flops.gain == pytest.approx(-0.5)
    assert pair.equal_loss.loss == 3.5
    assert pair.equal_loss.speed_up(flops) == pytest.approx(75 / 100)
    assert pair.below_from is None


def test_a_baseline_of_the_same_data():
    longer = run("longer", {50: 4, 100: 3, 160: 2.5}, {10: 5, 160: 2.5})
    tst = run("tst", {20: 6, 100: 2.7}, {20: 5, 100: 3}, s=4, boundary=20)
    (pair,) = compare([tst, longer]).pairs
    assert (pair.equal_data.at, pair.equal_data.ended) == (16_000, True)
    assert pair.equal_data.gain == pytest.approx(-0.2)
    assert (pair.equal_flops.at, pair.equal_flops.ended) == (100_000, False)
    assert pair.equal_flops.gain == pytest.approx(0.3)
    # the baseline has 2.7 after 136 steps
    assert pair.equal_loss.speed_up(flops) == pytest.approx(1.36)


def test_spike_and_recovery():
    training = {10: 6.0, 20: 5.0, 21: 6.5, 40: 5.5, 60: 4.5, 100: 3.0}
    (summary,) = compare([run("tst", {20: 6, 100: 3}, training, s=4, boundary=20)]).runs
    assert (summary.bag_loss, summary.spike) == (5.0, 1.5)
    assert summary.recovery_steps == pytest.approx(30)  # half-way from 40 to 60
    never = {20: 5.0, 21: 6.5, 40: 5.5}
    (summary,) = compare([run("tst", {20: 6, 40: 5}, never, s=4, boundary=20)]).runs
    assert summary.recovery_steps is None


def test_training_losses_where_a_run_has_no_validation():
    # 100 logged steps: a trailing mean of 2, in recovery only
    tst = run("tst", {}, {step: 6 - step / 50 for step in range(1, 101)}, s=4, boundary=20)
    baseline = run("baseline", {100: 3}, {step: 6 - step / 40 for step in range(1, 101)})
    comparison = compare([tst, baseline])
    assert comparison.kind == "training"
    assert comparison.runs[0].final_loss == pytest.approx(6 - 99.5 / 50)
    (pair,) = comparison.pairs
    assert pair.equal_flops.loss == pytest.approx(6 - 99.5 / 50)
    assert pair.equal_flops.baseline_loss == pytest.approx(6 - 99.5 / 40)
    # at the baseline's data the run is at step 40: 4 * 20 + 20 = 100
    assert pair.equal_data.loss == pytest.approx(6 - 39.5 / 50)


def test_a_run_still_in_superposition():
    tst = run("tst", {}, {1: 6.0, 20: 5.0}, s=4, boundary=20)
    (pair,) = compare([tst, BASELINE], "training").pairs
    assert (pair.equal_flops.at, pair.equal_flops.gain) == (None, None)
    assert pair.equal_loss is None


def test_runs_that_are_compared_where_both_have_losses():
    """The last validation of a run that is going on says nothing of where it is now."""
    losses = {0: 7, 50: 4, 100: 3}
    going_on = run("tst", {0: 7, 50: 4}, {20: 5, 99: 3}, s=4, boundary=20)
    (pair,) = compare([going_on, run("baseline", losses)]).pairs
    assert (pair.equal_flops.at, pair.equal_flops.gain) == (50_000, 0)


def test_runs_stopped_at_the_same_step_of_longer_schedules():
    tst = run("tst", {20: 6, 100: 2.7}, {20: 5, 100: 3}, s=4, boundary=20)
    for steps, ended in ((100, True), (300, False), (None, True)):
        (pair,) = compare([replace(tst, steps=steps), BASELINE]).pairs
        assert pair.equal_flops.ended == ended


def test_losses_of_other_units_have_no_spike():
    tst = run("tst", {20: 6, 100: 2.7}, {20: 50, 21: 6, 100: 3}, s=4, boundary=20)
    (summary,) = compare([replace(tst, loss="bce")]).runs
    assert (summary.spike, summary.recovery_steps) == (None, None)


def test_a_loss_that_is_not_finite_is_left_out():
    tst = run("tst", {20: 6, 60: float("nan"), 100: 2.7}, {20: 5, 100: 3}, s=4, boundary=20)
    (pair,) = compare([tst, BASELINE]).pairs
    assert pair.equal_flops.gain == pytest.approx(0.3)
