"""Run torchrun for jobs that may be stopped: ``python -m torchtitan.experiments.tst.launch``.

The arguments are torchrun's, except ``--max-restarts``. Three things differ:

- SIGTERM and SIGUSR1 are passed on to the training processes, which then have all the time they
  need to write a checkpoint. torchrun kills them 30 seconds after SIGTERM, and SIGUSR1 kills
  torchrun itself.
- If the processes end with an error of one line (:mod:`.resilience.reporting`), it is printed once,
  without torchrun's table of failures. The exit code is that of the processes.
- If they end with :data:`.resilience.stop.STOPPED_EXIT_CODE`, so does this process. This is also
  the exit code if they were stopped before they handled signals. torchrun's is always 1.
"""

import functools
import logging
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .engine import is_03
from .errors import ConfigTextError
from .resilience import reporting
from .resilience.stop import STOP_SIGNALS, STOPPED_EXIT_CODE
from .upstream.replaced import replace

ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # less fragmentation of memory


def default_processes() -> int:
    """Return the number of processes for this machine: one per GPU, or 2 on CPU."""
    return torch.accelerator.device_count() or 2


def check_processes(processes: int) -> None:
    """Check that each process has its own GPU, if this machine has GPUs.

    Raises:
        ConfigTextError: if there are more processes than GPUs.
    """
    gpus = torch.accelerator.device_count()
    if 0 < gpus < processes:
        raise ConfigTextError(
            f"--nproc {processes}: must be at most {gpus}, the number of GPUs of this machine"
        )


def handle_stop_signals() -> None:
    """Make a stop signal end this process: nothing has started that it would have to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(STOPPED_EXIT_CODE))


def replace_by_launcher(
    arguments: list[str], processes: int, log_rank: str, module: str
) -> NoReturn:
    """Replace this process by the launcher of a job's processes.

    Args:
        arguments: arguments of the job, as on the command line.
        processes: number of processes.
        log_rank: ranks whose output is shown, such as "0,1".
        module: module that each process runs.
    """
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the launcher listens
    launch = [
        *(sys.executable, "-m", f"{__package__}.launch", f"--nproc_per_node={processes}"),
        *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"),
        *(f"--local-ranks-filter={log_rank}", "--role=rank", "--tee=3", "-m", module, *arguments),
    ]
    os.execv(sys.executable, launch)


class _Launch:
    """The state of this launch: its processes, and whether it was asked to stop."""

    def __init__(self) -> None:
        self.context: api.PContext | None = None
        self.stopped = False

    def listen(self) -> None:
        """Handle the stop signals."""
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
        """Return the exit code of the launch, given the failure of its processes."""
        codes = {failure.exitcode for failure in error.failures.values()}
        # If one process has stopped, all have. Before they handle signals, a signal ends them.
        # On TorchTitan 0.3 they never do: what they did since their last checkpoint is lost.
        ended_by_signal = self.stopped and codes <= {-number for number in STOP_SIGNALS}
        ended_by_signal = ended_by_signal and not is_03()
        return STOPPED_EXIT_CODE if STOPPED_EXIT_CODE in codes or ended_by_signal else 1


def _is_redundant(record: logging.LogRecord) -> bool:
    """Return whether a message of torchrun is redundant: the error itself is printed."""
    codes = (reporting.EXIT_CODE, STOPPED_EXIT_CODE)
    failed = (f"failed (exitcode: {code}) " for code in codes)
    return record.getMessage().startswith((*failed, "Sending process"))


def main() -> None:
    """Run torchrun on the command line's arguments."""
    if run.parse_args(sys.argv[1:]).max_restarts:
        sys.exit(
            "--max-restarts: must be 0, because torchrun would restart a job that was stopped; "
            "remove it"
        )
    launch, start = _Launch(), api.PContext.start

    @functools.wraps(start)
    def start_and_listen(context: api.PContext) -> None:
        start(context)  # installs torchrun's own handlers
        launch.context = context
        launch.listen()

    replace(api.PContext, "start", start_and_listen)
    launch.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # replace_by_launcher blocked them
    os.environ[reporting.UNDER_LAUNCH] = "1"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger(api.__name__).addFilter(lambda record: not _is_redundant(record))
    try:
        run.main()
    except ChildFailedError as error:
        if (code := launch.exit_code(error)) == STOPPED_EXIT_CODE:
            sys.exit(code)
        assert launch.context is not None  # because a process has failed
        for text in reporting.texts_of(launch.context.error_files.values()):
            print(text, file=sys.stderr)
        if reporting.is_all(failure.exitcode for failure in error.failures.values()):
            sys.exit(reporting.EXIT_CODE)
        raise


if __name__ == "__main__":
    main()
