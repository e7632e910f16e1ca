"""Work that rank 0 of a launch does for all ranks, also before there is a process group."""

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

_PIECE = 2**22  # bytes of a value in the store, which takes 8 MiB
_PATIENCE = timedelta(hours=1)  # in which rank 0 does the work

_results: dict[str, Any] = {}


def once_in_launch(key: str, function: Callable[[], Result]) -> Result:
    """Return what the function returns on rank 0, where it is called once in a launch.

    The ranks may call this in any order, and at any time. A process that is no rank of a launch,
    its only one, or of a launch that torchrun restarts calls the function each time.

    Args:
        key: of the result, the same on all ranks.
        function: its result can be pickled.

    Raises:
        Exception: on all ranks, what the function raises on rank 0.
        DataError: if rank 0 is gone, or needs more than an hour.
    """
    if not _can_share():
        return function()
    if key not in _results:
        rank_0 = os.environ["RANK"] == "0"
        try:
            _results[key] = _give(key, function) if rank_0 else _take(key)
        except dist.DistError as error:
            raise DataError(f"rank 0 has ended, or takes too long, over {key}") from error
    return _results[key]


def _can_share() -> bool:
    """Whether this is one of several ranks, which meet in a new store."""
    environment = os.environ
    # a node of a cluster may have the others, too
    of_a_rank = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= {*environment}
    # the store of torchrun stays when it restarts, and nodes count restarts on their own
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return of_a_rank and restarts == 0 and int(environment.get("WORLD_SIZE", "1")) > 1


@functools.cache
def _store() -> dist.Store:
    """Return the store of the launch, and keep it: without torchrun it is rank 0 that has it."""
    store, _, _ = next(dist.rendezvous("env://", timeout=_PATIENCE))
    return dist.PrefixStore("tst/once", store)


def _give(key: str, function: Callable[[], Result]) -> Result:
    result, error = None, None
    try:
        result = function()
    except Exception as caught:  # the other ranks must not wait for ever
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
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # such as one whose constructor takes something else than its message
        return DataError(in_one_line(error))
    return error


def _take(key: str) -> Any:
    pieces = int(_store().get(key))
    content = b"".join(_store().get(f"{key}/{number}") for number in range(pieces))
    result, error = pickle.loads(content)
    if error:
        raise error
    return result
