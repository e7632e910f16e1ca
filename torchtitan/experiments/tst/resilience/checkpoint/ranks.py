"""Work that the ranks of a run do together, or that one of them does for all."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .manifests import CheckpointError

Share = Callable[[Any], list[Any]]


def from_rank_0(share: Share, function: Callable[[], Any]) -> Any:
    """Return the function's result on rank 0, there called alone.

    Args:
        share: gives a value of every rank.
        function: to be called.

    Raises:
        CheckpointError: on all ranks, the error of rank 0.
    """
    return on_all_ranks(share, function if dist.get_rank() == 0 else lambda: None)[0]


def on_all_ranks(share: Share, function: Callable[[], Any]) -> list[Any]:
    """Return the function's results of all ranks.

    Args:
        share: gives a value of every rank.
        function: to be called.

    Raises:
        CheckpointError: on all ranks, of the first that has an error.
    """
    result, error = None, ""
    try:
        result = function()
    except (CheckpointError, OSError) as caught:
        error = str(caught)
    shared = share((result, error))
    for _, error in shared:
        if error:
            raise CheckpointError(error)
    return [result for result, _ in shared]
