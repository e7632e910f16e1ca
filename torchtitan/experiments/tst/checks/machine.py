"""Check that this machine has what a job needs, before a device is used."""

import os
import sys
from importlib.util import find_spec

from torchtitan.components.checkpoint import AsyncMode
from torchtitan.config import JobConfig
from torchtitan.tools.utils import device_type, has_cuda_capability, has_rocm_capability

from ..config.layout import compiles
from ..errors import ConfigError, ConfigTextError

_GPU_OF_FLOAT8 = (8, 9)
_GPU_OF_MX = (10, 0)
_ROCM_OF_MX = (9, 5)


def check_machine(job_config: JobConfig) -> None:
    """Check that this machine has what the job needs.

    Raises:
        ConfigError: if it lacks a GPU or a package; names the key, its value and what it needs.
    """
    async_mode = job_config.checkpoint.async_mode
    if async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM and device_type == "cpu":
        raise ConfigError(
            "checkpoint.async_mode", async_mode, 'needs an accelerator; use "async" on CPU'
        )
    if job_config.profiling.enable_memory_snapshot and device_type == "cpu":
        raise ConfigError(
            "profiling.enable_memory_snapshot",
            True,
            "needs an accelerator, because it records the memory of one; set it to false on CPU",
        )
    if job_config.metrics.enable_wandb and not _is_installed("wandb"):
        raise ConfigError(
            "metrics.enable_wandb",
            True,
            'needs the package wandb: pip install "torchtitan-tst[wandb]"',
        )
    for name in job_config.model.converters:
        _check_converter(job_config, name)


def _is_installed(package: str) -> bool:
    return package in sys.modules or find_spec(package) is not None


def _check_converter(job_config: JobConfig, name: str) -> None:
    """Check that a quantization has its package and a GPU that supports it."""
    if not name.startswith("quantize."):
        return
    names = job_config.model.converters
    if not _is_installed("torchao"):
        raise ConfigError(
            "model.converters", names, f"{name} needs the package torchao: pip install torchao"
        )
    if name.endswith(".mx"):
        able = has_cuda_capability(*_GPU_OF_MX)
        if name == "quantize.linear.mx":
            able = able or has_rocm_capability(*_ROCM_OF_MX)
        gpu = "B200, or another GPU of compute capability 10.0 or later"
    else:
        emulates = name == "quantize.linear.float8" and job_config.quantize.linear.float8.emulate
        able = has_cuda_capability(*_GPU_OF_FLOAT8) or (
            emulates and not compiles(job_config, "model")
        )
        gpu = "GPU of compute capability 8.9 or later, such as H100"
        if name == "quantize.linear.float8":
            gpu += "; elsewhere, set quantize.linear.float8.emulate = true without compile.enable"
    if not able:
        raise ConfigError("model.converters", names, f"{name} needs a {gpu}")


def check_launch(job_config: JobConfig) -> None:
    """Check that a launcher started this process.

    Raises:
        ConfigTextError: if none did.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
    if missing and job_config.comm.mode == "default":
        raise ConfigTextError(
            f"{', '.join(missing)}: not set in the environment; start the job with `tst train` or "
            "torchrun"
        )
