import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchtitan.experiments.tst.core import BatchShape, Phase, Schedule, Stage


def test_phase_is_a_function_of_the_step():
    schedule = Schedule.of([6], [3])
    phases = [schedule.phase(step) for step in range(1, 6)]
    assert phases == [Phase.SUPERPOSITION] * 3 + [Phase.RECOVERY] * 2
    assert [schedule.bag_size_at(step) for step in (3, 4)] == [6, 1]


@given(
    st.lists(st.tuples(st.integers(2, 5), st.integers(0, 4)), max_size=6),
    st.integers(0, 30),
)
def test_stages_are_the_bag_sizes_of_the_steps(stages, steps):
    """Written out step by step, whatever has no steps and whatever repeats."""
    schedule = Schedule.of(*zip(*stages, strict=True)) if stages else Schedule()
    in_order = [bag_size for bag_size, count in stages for _ in range(count)]
    expected = (in_order + [1] * (steps + 1))[: steps + 1]
    assert [schedule.bag_size_at(step) for step in range(1, steps + 2)] == expected
    until = schedule.until(steps)
    assert [s.bag_size for s in until for _ in range(s.first, s.last + 1)] == expected[:steps]
    assert sum(stage.steps for stage in until) == steps
    assert [(s.bag_size > 1, s.first) for s in until] == [
        (size > 1, step)
        for step, size in enumerate(expected[:steps], 1)
        if step == 1 or size != expected[step - 2]
    ]
    changes = [step for step in range(1, steps + 1) if schedule.changes_after(step)]
    assert changes == [step for step in range(1, steps + 1) if expected[step - 1] != expected[step]]
    phases = [str(stage.phase) for stage in until for _ in range(stage.steps)]
    assert phases == [str(schedule.phase(step)) for step in range(1, steps + 1)]
    assert schedule.boundary == len(in_order)


def test_neighbors_of_one_bag_size_are_one_stage():
    assert Schedule.of([4, 4, 2, 3, 4], [1, 2, 0, 1, 5]).stages == (
        Stage(4, 1, 3),
        Stage(3, 4, 4),
        Stage(4, 5, 9),
    )
    assert Schedule.of([4, 4], [3, 2]) == Schedule.of([4], [5])


def test_a_stage_has_bags():
    with pytest.raises(ValueError, match="bag size of a stage must be at least 2, not 1"):
        Schedule.of([4, 1], [3, 2])


@pytest.mark.parametrize("schedule", [Schedule(), Schedule.of([6], [0])])
def test_off(schedule):
    assert not schedule.enabled
    assert schedule.phase(1) is Phase.RECOVERY
    assert schedule.batch_shape(1, 8, 64) == BatchShape(8, 64, 64)


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        (Schedule.of([4], [1]), BatchShape(8, 256, 64)),
        (Schedule.of([4], [1], mode="input"), BatchShape(8, 256, 64)),
        (Schedule.of([4], [1], mode="output"), BatchShape(8, 64, 64)),
        (Schedule.of([4], [1], scale="batch"), BatchShape(32, 64, 16)),
    ],
)
def test_batch_shapes(schedule, shape):
    assert schedule.batch_shape(1, 8, 64) == shape
    assert schedule.batch_shape(2, 8, 64) == BatchShape(8, 64, 64)
    # in both scales a superposition step has as many latents as an ordinary one, or s times fewer
    # per sequence and s times the sequences
    assert shape.sequences * shape.latents == 8 * 64


def test_batch_scale_needs_a_divisible_sequence():
    schedule = Schedule.of([2, 4], [1, 1], scale="batch")
    assert schedule.batch_shape(1, 8, 66) == BatchShape(16, 66, 33)
    with pytest.raises(ValueError, match="seq_len 66 must be a multiple of the bag size 4"):
        schedule.batch_shape(2, 8, 66)
