"""Batches, and the options of a ``DataLoader`` that returns them as its dataset made them."""

import signal
from typing import Any

import torch

from ..resilience.stop import STOP_SIGNALS

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
# Inputs, labels, and the state of the loader after them; None within a step.
StatedBatch = tuple[dict[str, torch.Tensor], torch.Tensor, str | None]


def loader_options(workers: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for a ``DataLoader`` that returns batches as they are.

    Args:
        workers: ``num_workers``, ``persistent_workers``, ``pin_memory`` and ``prefetch_factor``.
    """
    options = dict(workers)
    if not options["num_workers"]:
        del options["persistent_workers"], options["prefetch_factor"]
    return options | {"batch_size": None, "worker_init_fn": _leave_signals_to_parent}


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore the first stop signal, which a cluster sends to all processes of a job.

    A second one, such as SIGTERM from the parent, ends the worker.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))
