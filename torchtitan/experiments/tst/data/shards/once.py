"""Work that rank 0 of a launch does for all ranks, also before there is a process group."""

import functools
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import DataError

Result = TypeVar("Result")

_PIECE = 2**22  # bytes of a value in the store, which takes 8 MiB
_PATIENCE = timedelta(hours=1)  # in which rank 0 does the work

_results: dict[str, Any] = {}


def once_in_launch(key: str, function: Callable[[], Result]) -> Result:
    """Return what the function returns on rank 0, where it is called once in a launch.

    The ranks may call this in any order, and at any time. A process that is no rank of a launch,
    or its only one, calls the function each time.

    Args:
        key: of the result, the same on all ranks.
        function: its result can be pickled.

    Raises:
        Exception: on all ranks, what the function raises on rank 0.
        DataError: if rank 0 is gone, or needs more than an hour.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not {"RANK", "MASTER_ADDR"} <= {*os.environ}:
        return function()
    if key not in _results:
        rank_0 = os.environ["RANK"] == "0"
        try:
            _results[key] = _give(key, function) if rank_0 else _take(key)
        except dist.DistError as error:
            raise DataError(f"rank 0 has ended, or takes too long, over {key}") from error
    return _results[key]


@functools.cache
def _store() -> dist.Store:
    """That of the launch; kept, as without torchrun it is rank 0 that has it."""
    store, _, _ = next(dist.rendezvous("env://", timeout=_PATIENCE))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"tst/once/{attempt}", store)


def _give(key: str, function: Callable[[], Result]) -> Result:
    result, error = None, None
    try:
        result = function()
    except Exception as caught:  # the other ranks must not wait for ever
        error = caught
    content = pickle.dumps((result, error))
    pieces = range(0, len(content), _PIECE)
    for number, begin in enumerate(pieces):
        piece = content[begin : begin + _PIECE]
        _store().set(f"{key}/{number}", piece)  # type: ignore[arg-type] # takes bytes too
    _store().set(key, str(len(pieces)))
    if error:
        raise error
    return result  # type: ignore[return-value]


def _take(key: str) -> Any:
    pieces = int(_store().get(key))
    content = b"".join(_store().get(f"{key}/{number}") for number in range(pieces))
    result, error = pickle.loads(content)
    if error:
        raise error
    return result
