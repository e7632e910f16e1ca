"""torchrun with the exit code of a stopped run: ``python -m torchtitan.experiments.tst.launch``.

Takes torchrun's arguments. Two things differ:

- SIGTERM and SIGUSR1 are passed on to the training processes, which then have all the time they
  need to write a checkpoint. torchrun kills them 30 seconds after SIGTERM, and SIGUSR1 kills
  torchrun itself.
- If they end with :data:`.stop.STOPPED_EXIT_CODE`, so does this process. torchrun ends with 1
  whatever they end with.
"""

import functools
import os
import signal
import sys
from contextlib import suppress

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .stop import STOP_SIGNALS, STOPPED_EXIT_CODE


def main() -> None:
    """Run torchrun on the command line's arguments."""
    PContext.start = _start_and_pass_signals_on(PContext.start)  # type: ignore[method-assign]
    try:
        run.main()
    except ChildFailedError as error:
        if any(failure.exitcode == STOPPED_EXIT_CODE for failure in error.failures.values()):
            sys.exit(STOPPED_EXIT_CODE)
        raise


def _start_and_pass_signals_on(start):
    """``PContext.start``, followed by other signal handlers than it has just installed."""

    @functools.wraps(start)
    def start_and_pass_signals_on(context: PContext) -> None:
        start(context)

        def pass_on(number, frame):
            for pid in context.pids().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

        for number in STOP_SIGNALS:
            signal.signal(number, pass_on)

    return start_and_pass_signals_on


if __name__ == "__main__":
    main()
