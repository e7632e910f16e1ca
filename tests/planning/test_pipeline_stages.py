"""How many micro-batches the ranks of a pipeline keep, against the order of torch's schedules."""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import get_schedule_class

from torchtitan.experiments.tst.planning.pipeline_stages import _rank

BACKWARD = {"FULL_BACKWARD", "BACKWARD_WEIGHT"}  # after which an activation is free
V = {"ZBVZeroBubble", "DualPipeV"}


def kept(name, degree, microbatches):
    """The most activations of a stage that each rank has at once, a mean over its two stages."""
    count = 2 * degree
    stages = [
        SimpleNamespace(
            stage_index=index,
            num_stages=count,
            group_size=degree,
            group_rank=0,
            has_backward=True,
            submod=None,
            is_first=index == 0,
            is_last=index == count - 1,
            group=None,
            stage_index_to_group_rank={},
        )
        for index in ([0, count - 1] if name in V else [0, degree])
    ]
    schedule = get_schedule_class(name)(stages, microbatches)
    found = []
    for rank in range(degree):
        now = most = 0
        for action in filter(None, schedule.pipeline_order[rank]):
            for part in action.sub_actions or [action]:
                kind = part.computation_type.name
                now += (kind == "FORWARD") - (kind in BACKWARD)
                most = max(most, now)
        found.append(most / 2)
    return found


@pytest.mark.parametrize(
    "name", ["Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
)
@pytest.mark.parametrize(("degree", "microbatches"), [(2, 8), (4, 8), (4, 16), (8, 16)])
def test_in_flight_is_that_of_the_schedules_order(name, degree, microbatches):
    parts = [[f"layers.{layer}"] for layer in range(2 * degree)]
    schedule = get_schedule_class(name)
    ranks = [_rank(rank, degree, parts, schedule, microbatches) for rank in range(degree)]
    assert [rank.in_flight for rank in ranks] == kept(name, degree, microbatches)
