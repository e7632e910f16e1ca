"""Stop between two steps on a signal: SIGTERM, or SIGUSR1, which Slurm can send at a time limit.

A rank that receives a signal tells the others. All finish the same step, write a checkpoint and end
with :data:`STOPPED_EXIT_CODE`. A batch script can queue the job again on this exit code.

Slurm signals every process of a job step, children included: DCP's checkpoint process, data loader
workers, Inductor's compile workers. A run needs them for its last step and its checkpoint, so they
must survive the signals that the rank itself handles.
"""

import atexit
import os
import signal
import threading
import time
from multiprocessing import popen_fork, resource_tracker
from types import FrameType
from typing import Any

from ..upstream.replaced import replace

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Stopped(SystemExit):
    """The run was asked to stop and has stopped; its last checkpoint is complete."""

    def __init__(self) -> None:
        super().__init__(STOPPED_EXIT_CODE)


REPEAT_SECONDS = 5.0  # a signal within this time counts as the same request, forwarded by somebody


class StopRequest:
    """Remembers the first signal of :data:`STOP_SIGNALS`; a later one ends the process at once.

    From :meth:`listen` on, all threads block the signals, except one thread that waits for them. So
    the main thread may be anywhere, for example in a collective that hangs. Children inherit the
    mask, whoever starts them, and survive a signal that is sent to every process.

    Attributes:
        signal: number of the signal received; 0 for none.
    """

    def __init__(self) -> None:
        self.signal, self._since = 0, 0.0
        self._waiting: threading.Thread | None = None
        # the state before listen()
        self._handlers: dict[signal.Signals, Any] = {}
        self._mask: set[int] = set()
        self._wakeup_fd = -1

    def listen(self) -> None:
        """Handle the signals from now on. Does nothing outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        # Python writes the number of a signal to this pipe at once, whichever thread receives it.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.signal(number, _do_nothing) for number in STOP_SIGNALS}
        self._wakeup_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS))
        # Python unblocks SIGTERM in the thread that starts its resource tracker, which would be the
        # thread that starts a child next. So start the tracker now, and block SIGTERM again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        _end_children_by_sigkill()
        self._waiting = threading.Thread(target=self._wait, name="stop signals", daemon=True)
        self._waiting.start()

    def ignore_signals(self) -> None:
        """Ignore the signals; call it when everything is saved and the process is about to end."""
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Restore the signal handling from before :meth:`listen`."""
        if self._waiting is None:
            return
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is _do_nothing:
                signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        os.write(self._write, b"\0")  # ends the thread
        self._waiting.join()
        self._waiting = None
        os.close(self._read)
        os.close(self._write)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _wait(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        while number := os.read(self._read, 1)[0]:
            if number in STOP_SIGNALS:  # other signals have their own handlers
                self._receive(number)

    def _receive(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.signal and time.monotonic() - self._since < REPEAT_SECONDS:
            return
        if self.signal:
            os.write(2, f"{name} again: ending at once\n".encode())
            os._exit(128 + number)
        self.signal, self._since = number, time.monotonic()
        os.write(
            2, f"{name}: stopping within two more steps; a second signal ends at once\n".encode()
        )


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Do nothing: Python has written the signal's number to the pipe."""


def _end_children_by_sigkill() -> None:
    """Make multiprocessing end its children with SIGKILL.

    It would use SIGTERM, which the children block, and then wait for them.
    """
    replace(popen_fork.Popen, "terminate", popen_fork.Popen.kill)
    # registered last, so that it runs before the exit handler of multiprocessing
    atexit.unregister(_expect_killed_children)
    atexit.register(_expect_killed_children)


def _expect_killed_children() -> None:
    """Remove torch's handler of SIGCHLD, which takes a killed data loader worker for a crash."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
