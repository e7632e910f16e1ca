"""Do work on rank 0 for all ranks of a launch, even before there is a process group."""

import functools
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ...errors import in_one_line
from ..errors import DataError

Result = TypeVar("Result")

_PIECE = 2**22  # bytes of a value in the store, whose limit is 8 MiB
_PATIENCE = timedelta(hours=1)  # the time that rank 0 has for the work

_results: dict[str, Any] = {}


def once_in_launch(key: str, function: Callable[[], Result]) -> Result:
    """Call a function on rank 0, once in a launch, and return its result on all ranks.

    The ranks may call this in any order, and at any time. Some processes call the function
    themselves each time: one that is not a rank of a launch, one that is its only rank, and the
    ranks of a launch that torchrun may restart.

    Args:
        key: name of the result, the same on all ranks.
        function: the work; its result must be picklable.

    Raises:
        Exception: on all ranks, the error that the function raises on rank 0.
        DataError: if rank 0 has ended, or needs more than an hour.
    """
    if not _can_share():
        return function()
    if key not in _results:
        rank_0 = os.environ["RANK"] == "0"
        try:
            _results[key] = _give(key, function) if rank_0 else _take(key)
        except dist.DistError as error:
            raise DataError(
                f"rank 0 has ended, or needs more than an hour, for {key}; read its output"
            ) from error
    return _results[key]


def _can_share() -> bool:
    """Return whether this is one of several ranks that can share a new store."""
    environment = os.environ
    # A node of a cluster may set some of these without a launch.
    of_a_rank = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= {*environment}
    # torchrun keeps its store when it restarts, and each node counts its own restarts.
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return of_a_rank and restarts == 0 and int(environment.get("WORLD_SIZE", "1")) > 1


@functools.cache
def _store() -> dist.Store:
    """Return the store of the launch; keep it, because without torchrun rank 0 serves it."""
    store, _, _ = next(dist.rendezvous("env://", timeout=_PATIENCE))
    return dist.PrefixStore("tst/once", store)


def _give(key: str, function: Callable[[], Result]) -> Result:
    """Call the function, and store its result or its error for the other ranks."""
    result, error = None, None
    try:
        result = function()
    except Exception as caught:  # the other ranks must not wait forever
        error = caught
    content = pickle.dumps((result, error and _picklable(error)))
    pieces = range(0, len(content), _PIECE)
    for number, begin in enumerate(pieces):
        piece = content[begin : begin + _PIECE]
        _store().set(f"{key}/{number}", piece)  # type: ignore[arg-type] # takes bytes too
    _store().set(key, str(len(pieces)))
    if error:
        raise error
    return result  # type: ignore[return-value]


def _picklable(error: Exception) -> Exception:
    """Return the error itself if it can be pickled, else a DataError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # such as one whose constructor does not accept a message alone
        return DataError(in_one_line(error))
    return error


def _take(key: str) -> Any:
    """Wait for the result of rank 0; return it, or raise its error."""
    pieces = int(_store().get(key))
    content = b"".join(_store().get(f"{key}/{number}") for number in range(pieces))
    result, error = pickle.loads(content)
    if error:
        raise error
    return result
