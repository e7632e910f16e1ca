"""Undo what a job leaves in the process, so that it does not affect the next job."""

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import _random as dtensor_random
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.experimental._attention import _disable_context_parallel_dispatcher
from torchtitan.config import JobConfig
from torchtitan.distributed import activation_checkpoint
from torchtitan.distributed import utils as dist_utils

from .replaced import replaced, replaced_items


@contextlib.contextmanager
def own_state(job_config: JobConfig, ranks: int, rank: int) -> Iterator[None]:
    """Give a job the environment of one of its ranks, and undo what its trainer does.

    Args:
        job_config: the job's config.
        ranks: number of ranks of the job.
        rank: the rank that this process simulates.
    """
    environment = {"NGPU": f"{ranks}", "WORLD_SIZE": f"{ranks}", "RANK": f"{rank}"}
    environment["LOCAL_RANK"] = "0"
    disabled, collects = logging.root.manager.disable, gc.isenabled()

    def join(ranks: int, *args: object) -> None:
        dist.init_process_group("fake", rank=rank, world_size=ranks)

    with (
        replaced_items(os.environ, environment),
        replaced(dist_utils, "init_fake_mode", join),  # upstream's is always rank 0
        replaced(dtensor_random, "_rng_tracker", None),
        # "selective" chooses layers by a counter that is not reset between jobs
        replaced(activation_checkpoint, "_layer_sac_count", 0),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        _forget_meshes()
        try:
            yield
        finally:
            logging.disable(disabled)
            if job_config.parallelism.context_parallel_degree > 1:
                _disable_context_parallel_dispatcher()
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_meshes()
            if collects:
                gc.enable()  # upstream's trainer disables it, and collects by itself


def _forget_meshes() -> None:
    """Clear DTensor's caches: their meshes equal the next job's, but name groups that are gone."""
    _clear_sharding_prop_cache()
    DTensor._op_dispatcher.sharding_propagator._propagate_tensor_meta_cached.cache_clear()
