"""Complete torch for TorchTitan on a machine without an accelerator: patches of torch alone.

TorchTitan 0.2.2 (:mod:`.cpu`) and 0.3 (``titan03.cpu``) both need them. Importing this module does
nothing.
"""

import contextlib
import functools
import os
import platform
import resource
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
from torch.nn.attention.flex_attention import BlockMask, create_mask
from typing_extensions import override

from .replaced import replace


def complete_torch_if_alone() -> bool:
    """Give torch what TorchTitan needs, if there is no accelerator. Return whether it did.

    Modules that are already imported are patched too.
    """
    if torch._utils._get_available_device_type() is not None:
        return False
    _settle_device_type()
    _complete_torch_cpu()
    _make_collectives_run_on_gloo()
    _make_histc_count_integers()
    _make_attention_parallel_on_cpu()
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


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, **options: Any
) -> torch.Tensor:
    """Return attention with a dense mask: on CPU, flex attention has no backward.

    Args:
        q: queries (B, heads, L, head_dim).
        k: keys (B, key heads, L, head_dim).
        v: values, as the keys.
        mask: mask of flex attention.
        options: ``scale`` and ``enable_gqa``, as for ``scaled_dot_product_attention``.
    """
    batch, heads = mask.shape[:2]
    dense = create_mask(mask.mask_mod, batch, heads, q.shape[2], k.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, dense, **options)


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
