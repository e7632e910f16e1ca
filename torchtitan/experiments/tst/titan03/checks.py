"""Check a config of TorchTitan 0.3 before a device is used."""

import os
from typing import Any

import torch
import torch.distributed as dist

from ..checks.superposition import check_superposition
from ..core import Schedule
from ..errors import ConfigError, ConfigTextError


def check_config(config: Any) -> Schedule:
    """Check that a config can run in both phases.

    Args:
        config: a ``SuperpositionTrainer.Config``.

    Returns:
        Phase and bag size of each step.

    Raises:
        ConfigError: if it cannot; names the key, its value and what is allowed.
    """
    section, parallelism = config.superposition, config.parallelism
    if not hasattr(dist, "set_timeout"):  # on CPU, titan03.cpu has added it
        raise ConfigTextError(
            f"TorchTitan 0.3 needs torch 2.14 or later on a GPU, and this is torch "
            f"{torch.__version__}: pip install 'torch>=2.14'"
        )
    sharded = (
        parallelism.spmd_backend == "spmd_types" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    )
    if sharded and torch.__version__ < "2.14":
        raise ConfigError(
            "parallelism.spmd_backend",
            parallelism.spmd_backend,
            f"must be partial_dtensor on several ranks with torch {torch.__version__}; "
            "torch 2.14 has both",
        )
    schedule = check_superposition(section, config.training, config.checkpoint.enable)
    if not schedule.enabled:
        return schedule
    if section.reinit_at_recovery:
        raise ConfigError(
            "superposition.reinit_at_recovery",
            section.reinit_at_recovery,
            "must be empty: this ablation needs TorchTitan 0.2.2",
        )
    if parallelism.spmd_backend == "full_dtensor":
        raise ConfigError(
            "parallelism.spmd_backend",
            parallelism.spmd_backend,
            "must be spmd_types or partial_dtensor with superposition",
        )
    if config.debug.spmd_typechecking:
        raise ConfigError(
            "debug.spmd_typechecking", True, "must be false: bags have no types to check"
        )
    return schedule
