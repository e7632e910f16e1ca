"""Running where there is no accelerator: what upstream 0.2.2 needs on CPU, in one place.

Importing this module does nothing. :func:`enable_cpu_if_alone` patches torch and torchtitan, and
only on a machine without an accelerator. Upstream's own entry points run on such a machine with
``python -m torchtitan.experiments.tst.device torchtitan.train ...``.
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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import _random as dtensor_random
from torchtitan.config import ConfigManager
from typing_extensions import override


def enable_cpu_if_alone() -> bool:
    """Make torchtitan run on CPU if there is nothing else; True if it did.

    To be called before ``torchtitan.train`` is imported.
    """
    if torch._utils._get_available_device_type() is not None:
        return False
    _settle_device_type()
    _complete_torch_cpu()
    _make_collectives_run_on_gloo()
    _make_histc_count_integers()
    dtensor_random._rng_tracker = _CpuRNGTracker()
    # With torch 2.13 the first exp of a process is now and then wrong by 1e-5, relative; later ones
    # are right. Get it over with.
    torch.zeros(4096).exp()
    return True


def _settle_device_type() -> None:
    """Upstream takes "cuda" for granted when it finds no accelerator."""
    torch._utils._get_available_device_type = lambda: "cpu"
    loaded: dict[str, Any] = dict(sys.modules)
    for name, module in loaded.items():
        if name.startswith("torchtitan.") and hasattr(module, "device_type"):
            module.device_type = "cpu"
            if hasattr(module, "device_module"):
                module.device_module = torch.cpu


def _complete_torch_cpu() -> None:
    """What upstream's memory monitor asks of a device module; memory is the process's."""
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

    dist.barrier = barrier_without_device  # type: ignore[assignment]
    FSDPModule.set_gradient_divide_factor = set_factor_and_force_sum  # type: ignore[method-assign]


def _make_histc_count_integers() -> None:
    """Upstream's MoE router counts expert ids with histc, which has no integer kernel on CPU."""
    histc = torch.histc

    @functools.wraps(histc)
    def histc_or_bincount(input, bins=100, min=0, max=0):
        if input.is_floating_point() or (min, max) != (0, bins):
            return histc(input, bins=bins, min=min, max=max)
        return torch.bincount(input, minlength=bins)

    torch.histc = histc_or_bincount  # type: ignore[assignment]


class _CpuRNGTracker(dtensor_random._RNGStateTracker):
    """Random values for DTensors on CPU, where DTensor itself has every shard draw the same ones.

    Each shard draws from its own seed; replicas of a shard draw the same values; the generator
    moves on alike on all ranks.
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
    """Run the module named first on the command line as ``python -m`` would."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m torchtitan.experiments.tst.device MODULE [ARGUMENTS]")
    enable_cpu_if_alone()
    sys.argv = sys.argv[1:]
    # its default arguments are those of the command line at the time of import
    ConfigManager.parse_args.__defaults__ = (sys.argv[1:],)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
