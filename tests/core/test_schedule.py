import pytest

from torchtitan.experiments.tst.core import BatchShape, Phase, Schedule


def test_phase_is_a_function_of_the_step():
    schedule = Schedule(bag_size=6, boundary=3)
    phases = [schedule.phase(step) for step in range(1, 6)]
    assert phases == [Phase.SUPERPOSITION] * 3 + [Phase.RECOVERY] * 2
    assert [schedule.bag_size_at(step) for step in (3, 4)] == [6, 1]


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(1, 10), Schedule(6, 0)])
def test_off(schedule):
    assert not schedule.enabled
    assert schedule.phase(1) is Phase.RECOVERY
    assert schedule.batch_shape(1, 8, 64) == BatchShape(8, 64, 64)


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        (Schedule(4, 1), BatchShape(8, 256, 64)),
        (Schedule(4, 1, mode="input"), BatchShape(8, 256, 64)),
        (Schedule(4, 1, mode="output"), BatchShape(8, 64, 64)),
        (Schedule(4, 1, scale="batch"), BatchShape(32, 64, 16)),
    ],
)
def test_batch_shapes(schedule, shape):
    assert schedule.batch_shape(1, 8, 64) == shape
    assert schedule.batch_shape(2, 8, 64) == BatchShape(8, 64, 64)
    # in both scales a superposition step has as many latents as an ordinary one, or s times fewer
    # per sequence and s times the sequences
    assert shape.sequences * shape.latents == 8 * 64


def test_batch_scale_needs_a_divisible_sequence():
    with pytest.raises(ValueError, match="66 tokens do not divide into bags of 4"):
        Schedule(4, 1, scale="batch").batch_shape(1, 8, 66)
