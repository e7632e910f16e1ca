"""What is made up for in TorchTitan's parallelisms, in single modules on two ranks."""

import copy
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.torch_version import TorchVersion
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama4.infra.parallelize import apply_moe_ep_tp
from torchtitan.models.moe import MoE, MoEArgs

from torchtitan.experiments.tst.core import IGNORE_INDEX
from torchtitan.experiments.tst.training.validate import FixedSetValidator
from torchtitan.experiments.tst.upstream import parallelize

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


def check_clipping():
    """Of a norm under sequence parallel, a rank has its part of the sequence's gradient."""
    mesh = init_device_mesh("cpu", (RANKS,))
    norm = nn.RMSNorm(8)
    parallelize_module(norm, mesh, SequenceParallel())
    torch.manual_seed(0)
    part = torch.randn(2, 4, 8).chunk(RANKS, dim=1)[dist.get_rank()]
    output = norm(DTensor.from_local(part, mesh, [Shard(1)]))
    (100 * output.full_tensor()).sum().backward()
    assert norm.weight.grad.placements[0].is_partial()
    expected = norm.weight.grad.full_tensor()
    with mock.patch.object(torch, "__version__", TorchVersion("2.11.0")):
        parallelize.add_up_partial_gradients([norm.weight])
    assert norm.weight.grad.placements == (Replicate(),)
    torch.testing.assert_close(norm.weight.grad.full_tensor(), expected)
    total = torch.nn.utils.get_total_norm([norm.weight.grad], foreach=True).full_tensor()
    torch.nn.utils.clip_grads_with_norm_([norm.weight], 1.0, total, foreach=True)
    assert norm.weight.grad.full_tensor().norm().item() == pytest.approx(1.0, rel=1e-5)


def test_all_gradients_are_clipped_with_torch_2_11(on_ranks):
    on_ranks(RANKS, check_clipping)


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
