"""Call functions on all ranks, or on rank 0 for all, and share results and errors."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .manifests import CheckpointError

Share = Callable[[Any], list[Any]]


def from_rank_0(share: Share, function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 only, and return its result on all ranks.

    Args:
        share: returns a value of every rank.
        function: the function to call.

    Raises:
        CheckpointError: on all ranks, with the error of rank 0.
    """
    return on_all_ranks(share, function if dist.get_rank() == 0 else lambda: None)[0]


def on_all_ranks(share: Share, function: Callable[[], Any]) -> list[Any]:
    """Call a function on all ranks, and return the results of all ranks on all ranks.

    Args:
        share: returns a value of every rank.
        function: the function to call.

    Raises:
        CheckpointError: on all ranks, with the error of the first rank that has one.
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
