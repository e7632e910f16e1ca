"""The trainer for TorchTitan 0.3 passes the conformance suite."""

import conformance_of_trainer_of_03 as description
import pytest
import torch.distributed as dist

from torchtitan.experiments.tst.core.conformance import check


class Experts(description.TST):
    """The trainer with a mixture of experts."""

    model = ("qwen3", "demo_moe")


@pytest.mark.parametrize("implementation", [description.TST, Experts])
def test_all_checks_pass(implementation):
    try:
        results = check(implementation)
    finally:
        dist.destroy_process_group()
    assert len(results) == 18
    assert not [result for result in results if result.problem]
