"""Run TorchTitan 0.2.2 without an accelerator: all patches that it needs on CPU.

Importing this module does nothing. :func:`enable_cpu_if_alone` patches torch and torchtitan, only
on a machine without an accelerator. Upstream's own entry points run on such a machine with
``python -m torchtitan.experiments.tst.upstream.cpu torchtitan.train ...``.
"""

import contextlib
import functools
import os
import platform
import resource
import runpy
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import _random as dtensor_random
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.experimental._context_parallel import _attention as context_parallel
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torchtitan.config import ConfigManager
from torchtitan.models import attention
from torchtitan.models.moe import utils as moe_utils
from typing_extensions import override

from .replaced import replace


def enable_cpu_if_alone() -> bool:
    """Make torchtitan run on CPU if there is no accelerator. Return whether it did.

    Call it before a trainer is built. Modules that are already imported are patched too.
    """
    if torch._utils._get_available_device_type() is not None:
        return False
    _settle_device_type()
    _complete_torch_cpu()
    _make_collectives_run_on_gloo()
    _make_histc_count_integers()
    _make_attention_parallel_on_cpu()
    _make_expert_permutation_run_on_cpu()
    _make_flex_attention_train_on_cpu()
    _make_profiler_run_without_gpu()
    replace(dtensor_random, "_rng_tracker", _CpuRNGTracker())
    # With torch 2.13, the first exp of a process sometimes has a relative error of 1e-5; later ones
    # are right. So compute one now.
    torch.zeros(4096).exp()
    return True


def _settle_device_type() -> None:
    """Set the device type to "cpu"; upstream assumes "cuda" when it finds no accelerator."""
    replace(torch._utils, "_get_available_device_type", lambda: "cpu")
    loaded: dict[str, Any] = dict(sys.modules)
    settled = {
        "_get_available_device_type": torch._utils._get_available_device_type,
        "device_type": "cpu",
        "device_module": torch.cpu,
    }
    for name, module in loaded.items():
        if name.startswith("torchtitan."):
            for attribute in settled.keys() & vars(module).keys():
                replace(module, attribute, settled[attribute])


def _complete_torch_cpu() -> None:
    """Give ``torch.cpu`` what upstream's memory monitor uses; memory is that of the process."""
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes

    def memory_stats(device: object = None) -> dict[str, int]:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    cpu: Any = torch.cpu
    cpu.get_device_name = lambda device=None: platform.processor() or platform.machine()
    cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=total_memory)
    cpu.memory_stats = memory_stats
    cpu.reset_peak_memory_stats = lambda device=None: None
    cpu.empty_cache = lambda: None


def _make_collectives_run_on_gloo() -> None:
    barrier = dist.barrier
    set_gradient_divide_factor = FSDPModule.set_gradient_divide_factor

    @functools.wraps(barrier)
    def barrier_without_device(group=None, async_op=False, device_ids=None):
        return barrier(group, async_op)  # "cpu" is refused as a device id

    @functools.wraps(set_gradient_divide_factor)
    def set_factor_and_force_sum(self, factor):
        # Upstream sets the factor on every FSDP module. Gloo has no PREMUL_SUM for it.
        set_gradient_divide_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    replace(dist, "barrier", barrier_without_device)
    replace(FSDPModule, "set_gradient_divide_factor", set_factor_and_force_sum)


def _make_histc_count_integers() -> None:
    """Make histc count integers: upstream's MoE router counts expert IDs with it.

    On CPU, torch has no integer kernel of it.
    """
    histc = torch.histc

    @functools.wraps(histc)
    def histc_or_bincount(input, bins=100, min=0, max=0):
        if input.is_floating_point() or (min, max) != (0, bins):
            return histc(input, bins=bins, min=min, max=max)
        return torch.bincount(input, minlength=bins)

    replace(torch, "histc", histc_or_bincount)


def _make_attention_parallel_on_cpu() -> None:
    """Make the CPU's attention kernel run under tensor and context parallelism.

    Torch supports only the GPU kernels there. Tensors are (B, heads, L, head_dim), log-sums
    (B, heads, L).
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    heads, sequence = 1, 2

    @register_sharding([forward, backward])
    def shard_heads(*args: Any, **kwargs: Any) -> list:
        tensors = sum(isinstance(arg, DTensorSpec) for arg in args)
        others: list = [None] * (len(args) - tensors)
        results = 2 if tensors == 3 else 3
        return [
            ([placement] * results, [placement] * tensors + others)
            for placement in (Replicate(), Shard(heads))
        ]

    def ring(op_call: Any, args: Any, kwargs: Any) -> Any:
        mesh = args[0].device_mesh
        values = [arg.to_local() if isinstance(arg, DTensor) else arg for arg in args]
        names = [argument.name for argument in op_call._schema.arguments]
        call = dict(zip(names, values, strict=False)) | {"scale": kwargs.get("scale")}
        if op_call is forward:
            parts = context_parallel._templated_ring_attention(
                mesh.get_group(), sequence, op_call, **call
            )
        else:
            parts = context_parallel._templated_ring_attention_backward(
                mesh.get_group(), sequence, op_call, grad_out_name="grad_out", **call
            )
        return tuple(DTensor.from_local(p, mesh, [Shard(sequence)], run_check=False) for p in parts)

    context_parallel.custom_ops.update({forward: ring, backward: ring})


def _make_expert_permutation_run_on_cpu() -> None:
    """Use upstream's CPU version of the permutation; upstream itself always uses Triton's."""
    on_cpu = functools.partial(moe_utils.generate_permute_indices, use_cpu=True)
    replace(moe_utils, "generate_permute_indices", on_cpu)


def _make_flex_attention_train_on_cpu() -> None:
    """Replace flex attention by attention with a dense mask: on CPU, flex has no backward."""

    def masked_attention(q, k, v, *, block_mask, scale, enable_gqa, return_lse):
        if return_lse:
            raise NotImplementedError("flex attention does not return log-sums on CPU")
        batch, heads = block_mask.shape[:2]
        mask = create_mask(block_mask.mask_mod, batch, heads, q.shape[2], k.shape[2], q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)

    wrapper = attention.FlexAttentionWrapper
    replace(wrapper, "_compiled_flex_attn", staticmethod(masked_attention))
    on_cpu = functools.partial(create_block_mask, device="cpu")
    replace(attention, "_compiled_create_block_mask", on_cpu)


def _make_profiler_run_without_gpu() -> None:
    """Drop the profiler activity of a GPU that upstream asks for; it is None without a GPU."""

    class Profile(torch.profiler.profile):
        def __init__(self, *, activities: Any = None, **kwargs: Any):
            there = None if activities is None else [a for a in activities if a is not None]
            super().__init__(activities=there, **kwargs)

    replace(torch.profiler, "profile", Profile)


class _CpuRNGTracker(dtensor_random._RNGStateTracker):
    """Random values for DTensors on CPU, where DTensor itself draws the same values in all shards.

    Each shard draws from its own seed, and replicas of a shard draw the same values. The generator
    advances in the same way on all ranks.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    @override
    @contextlib.contextmanager
    def _distribute_region(self, spec, generator=None):
        seed = int(torch.randint(2**62, (), generator=generator))
        shard = 0
        for placement, size, coordinate in zip(
            spec.placements, spec.mesh.shape, spec.mesh.get_coordinate(), strict=True
        ):
            if not placement.is_replicate():
                shard = shard * size + coordinate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + shard)
            yield


def main() -> None:
    """Run the module that the first argument names, as ``python -m`` would."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m torchtitan.experiments.tst.upstream.cpu MODULE [ARGUMENTS]")
    enable_cpu_if_alone()
    sys.argv = sys.argv[1:]
    # its default arguments are the command line at the time of import
    replace(ConfigManager.parse_args, "__defaults__", (sys.argv[1:],))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
