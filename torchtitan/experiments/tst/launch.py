"""torchrun for jobs that may be stopped: ``python -m torchtitan.experiments.tst.launch``.

Takes torchrun's arguments but ``--max-restarts``. Three things differ:

- SIGTERM and SIGUSR1 are passed on to the training processes, which then have all the time they
  need to write a checkpoint. torchrun kills them 30 seconds after SIGTERM, and SIGUSR1 kills
  torchrun itself.
- An error of theirs that is one line (:mod:`.resilience.reporting`) is said once, with their exit
  code, and not followed by torchrun's table of failures.
- If they end with :data:`.resilience.stop.STOPPED_EXIT_CODE`, so does this process, also if they
  were asked to stop before they could listen. torchrun ends with 1 whatever they end with.
"""

import functools
import logging
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .resilience import reporting
from .resilience.stop import STOP_SIGNALS, STOPPED_EXIT_CODE
from .upstream.replaced import replace

ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # less fragmentation of memory


class _Launch:
    """What has become of this launch: the processes started, and whether it was asked to stop."""

    def __init__(self) -> None:
        self.context: api.PContext | None = None
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


def _is_said_otherwise(record: logging.LogRecord) -> bool:
    """Whether a message of torchrun's tells of a process whose error is said, or of those ended."""
    said = f"failed (exitcode: {reporting.EXIT_CODE}) "
    return record.getMessage().startswith((said, "Sending process"))


def main() -> None:
    """Run torchrun on the command line's arguments."""
    if run.parse_args(sys.argv[1:]).max_restarts:
        sys.exit("--max-restarts: a job that was stopped would be started again; leave it out")
    launch, start = _Launch(), api.PContext.start

    @functools.wraps(start)
    def start_and_listen(context: api.PContext) -> None:
        start(context)  # installs torchrun's own handlers
        launch.context = context
        launch.listen()

    replace(api.PContext, "start", start_and_listen)
    launch.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # as .start leaves them
    os.environ[reporting.UNDER_LAUNCH] = "1"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger(api.__name__).addFilter(lambda record: not _is_said_otherwise(record))
    try:
        run.main()
    except ChildFailedError as error:
        if (code := launch.exit_code(error)) == STOPPED_EXIT_CODE:
            sys.exit(code)
        assert launch.context is not None  # a process has failed
        for text in reporting.texts_of(launch.context.error_files.values()):
            print(text, file=sys.stderr)
        if reporting.is_all(failure.exitcode for failure in error.failures.values()):
            sys.exit(reporting.EXIT_CODE)
        raise


if __name__ == "__main__":
    main()
