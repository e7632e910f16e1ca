"""torchrun for jobs that may be stopped: ``python -m torchtitan.experiments.tst.launch``.

Takes torchrun's arguments but ``--max-restarts``. Two things differ:

- SIGTERM and SIGUSR1 are passed on to the training processes, which then have all the time they
  need to write a checkpoint. torchrun kills them 30 seconds after SIGTERM, and SIGUSR1 kills
  torchrun itself.
- If they end with :data:`.stop.STOPPED_EXIT_CODE`, so does this process, also if they were asked to
  stop before they could listen. torchrun ends with 1 whatever they end with.
"""

import functools
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .stop import STOP_SIGNALS, STOPPED_EXIT_CODE


class _Launch:
    """What has become of this launch: the processes started, and whether it was asked to stop."""

    def __init__(self) -> None:
        self.context: PContext | None = None
        self.stopped = False

    def listen(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.context is None:
            sys.exit(STOPPED_EXIT_CODE)
        for pid in self.context.pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def exit_code(self, error: ChildFailedError) -> int:
        codes = {failure.exitcode for failure in error.failures.values()}
        # one that has stopped has seen all others do so; before they listen, a signal ends them
        ended_by_signal = self.stopped and codes <= {-number for number in STOP_SIGNALS}
        return STOPPED_EXIT_CODE if STOPPED_EXIT_CODE in codes or ended_by_signal else 1


def main() -> None:
    """Run torchrun on the command line's arguments."""
    if run.parse_args(sys.argv[1:]).max_restarts:
        sys.exit("--max-restarts: a job that was stopped would be started again; leave it out")
    launch, start = _Launch(), PContext.start

    @functools.wraps(start)
    def start_and_listen(context: PContext) -> None:
        start(context)  # installs torchrun's own handlers
        launch.context = context
        launch.listen()

    PContext.start = start_and_listen  # type: ignore[method-assign, assignment]
    launch.listen()
    try:
        run.main()
    except ChildFailedError as error:
        if (code := launch.exit_code(error)) == STOPPED_EXIT_CODE:
            sys.exit(code)
        raise


if __name__ == "__main__":
    main()
