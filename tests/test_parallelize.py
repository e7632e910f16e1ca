"""What is made up for in TorchTitan's parallelisms, in single modules on two ranks."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama4.infra.parallelize import apply_moe_ep_tp
from torchtitan.models.moe import MoE, MoEArgs

from torchtitan.experiments.tst import parallelize
from torchtitan.experiments.tst.core import IGNORE_INDEX
from torchtitan.experiments.tst.validate import FixedSetValidator

RANKS, WIDTH = 2, 16


def dims(**degrees):
    names = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp")
    layout = ParallelDims(**dict.fromkeys(names, 1) | degrees, world_size=RANKS)
    layout.build_mesh()
    return layout


def check_moe(ep, score_before_experts):
    layout = dims(tp=RANKS, ep=ep)
    torch.manual_seed(0)
    args = MoEArgs(
        num_experts=4,
        num_shared_experts=1,
        top_k=2,
        score_before_experts=score_before_experts,
        use_grouped_mm=False,
    )
    whole = MoE(args, WIDTH, 2 * WIDTH)
    with torch.no_grad():
        whole.init_weights(0.5, torch.device("cpu"))
    hidden, upstream = torch.randn(2, 2, 8, WIDTH).unbind()  # (B, L, d)
    expected = hidden.clone().requires_grad_()
    whole(expected).backward(upstream)

    block = nn.Module()
    block.moe, block.moe_enabled = copy.deepcopy(whole), True
    block.moe.zero_grad()
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": block})
    mesh = layout.get_mesh("tp")
    ep_mesh = layout.get_optional_mesh("ep")
    apply_moe_ep_tp(model, mesh, ep_mesh, etp_mesh=None, ep_etp_mesh=None)
    parallelize._complete_gradients(block.moe, mesh, lent=ep > 1)
    part = hidden.chunk(RANKS, dim=1)[dist.get_rank()].clone().requires_grad_()
    output = block.moe(part)
    output = output.to_local() if isinstance(output, DTensor) else output
    output.backward(upstream.chunk(RANKS, dim=1)[dist.get_rank()])

    torch.testing.assert_close(part.grad, expected.grad.chunk(RANKS, dim=1)[dist.get_rank()])
    of_whole = dict(whole.named_parameters())
    for name, parameter in block.moe.named_parameters():
        gradient = parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, of_whole[name].grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ep", [1, RANKS], ids=["tensor parallel", "lent to experts"])
@pytest.mark.parametrize("score_before_experts", [False, True], ids=["after", "before"])
def test_gradients_of_experts(on_ranks, ep, score_before_experts):
    on_ranks(RANKS, check_moe, ep, score_before_experts)


def check_validation_loss(targets):
    validator = FixedSetValidator.__new__(FixedSetValidator)
    validator.parallel_dims = dims(cp=RANKS)
    rank = dist.get_rank()
    labels = torch.full((1, 8), IGNORE_INDEX)
    labels[0, : targets[rank]] = 5
    summed = torch.tensor(3.0 * targets[rank])  # each target's loss is 3
    labels, divisor = validator._part_of_context(labels, validator.parallel_dims.get_mesh("cp"))
    loss = summed / divisor / (labels != IGNORE_INDEX).sum()  # as upstream does
    dist.all_reduce(loss)
    assert loss.item() == pytest.approx(3.0)


@pytest.mark.parametrize("targets", [(8, 8), (2, 8), (0, 5), (5, 0)], ids=str)
def test_validation_loss_of_parts_of_a_sequence(on_ranks, targets):
    on_ranks(RANKS, check_validation_loss, targets)


def die_without_a_word():
    os._exit(9)


def test_a_rank_that_dies_fails_the_test(on_ranks):
    with pytest.raises(pytest.fail.Exception, match="ended with 9"):
        on_ranks(RANKS, die_without_a_word)
