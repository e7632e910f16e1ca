import subprocess
import sys

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from torchtitan.experiments.tst.upstream.on_cpu import _CpuRNGTracker


def test_an_accelerator_leaves_everything_alone():
    """Nothing is patched where upstream finds a device of its own."""
    code = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.experimental._context_parallel import _attention
torch._utils._get_available_device_type = lambda: "cuda"
from torchtitan.experiments.tst.upstream.cpu import enable_cpu_if_alone
from torchtitan.models import attention
from torchtitan.models.moe import utils
def patched():
    return (
        torch.histc,
        dist.barrier,
        FSDPModule.set_gradient_divide_factor,
        dict(_attention.custom_ops),
        attention.FlexAttentionWrapper._compiled_flex_attn,
        attention._compiled_create_block_mask,
        utils.generate_permute_indices,
    )
before = patched()
assert not enable_cpu_if_alone()
assert before == patched()
assert not hasattr(torch.cpu, "memory_stats")
import torchtitan.tools.utils
assert torchtitan.tools.utils.device_type == "cuda"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the CPU alone is patched")
def test_modules_that_have_asked_for_the_device_are_patched_too():
    code = """
import torch
from torchtitan.tools import profiling, utils
from torchtitan.experiments.tst.upstream.cpu import enable_cpu_if_alone
assert utils.device_type == "cuda" and enable_cpu_if_alone() and not enable_cpu_if_alone()
assert utils.get_device_info() == ("cpu", torch.cpu)
assert (utils.device_type, utils.device_module) == ("cpu", torch.cpu)
assert profiling.device_module == torch.cpu
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the CPU alone is patched")
def test_histc_of_expert_ids_counts_integers():
    ids = torch.tensor([0, 3, 3, 1])
    counts = torch.histc(ids, bins=5, min=0, max=5)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [1, 1, 0, 2, 0]
    values = torch.tensor([0.5, 1.5])
    assert torch.histc(values, bins=2, min=0, max=2).tolist() == [1.0, 1.0]


def draws(placements, coordinate):
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), _init_backend=False, _rank=0)
    mesh.get_coordinate = lambda: coordinate
    torch.manual_seed(0)
    with _CpuRNGTracker()._distribute_region(DTensorSpec(mesh, placements)):
        inside = torch.randn(3)
    return inside.tolist(), torch.randn(3).tolist()


def test_shards_draw_different_values_and_replicas_the_same():
    ranks = [(i, j) for i in range(2) for j in range(2)]
    sharded = [draws((Shard(0), Shard(0)), rank) for rank in ranks]
    assert len({tuple(inside) for inside, _ in sharded}) == 4
    hybrid = [draws((Replicate(), Shard(0)), rank) for rank in ranks]
    assert [hybrid[0], hybrid[1]] == [hybrid[2], hybrid[3]]
    assert hybrid[0][0] != hybrid[1][0]
    # the generators of all ranks go on alike
    assert len({tuple(after) for _, after in sharded + hybrid}) == 1
