"""Stopping between two steps when asked to: SIGTERM, or SIGUSR1 as Slurm sends before a time limit.

A rank that is asked tells the others; all finish the same step, write a checkpoint and leave with
:data:`STOPPED_EXIT_CODE`, on which a batch script can queue the job again.

Slurm signals every process of a job step, children included: DCP's checkpoint process, data loader
workers, Inductor's compile workers. A run needs them for its last step and its checkpoint, so they
must survive the signals that the rank itself answers.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Stopped(SystemExit):
    """The run was asked to stop, and has: its last checkpoint is complete."""

    def __init__(self) -> None:
        super().__init__(STOPPED_EXIT_CODE)


REPEAT_SECONDS = 5.0  # within which a signal is taken for the same request, sent on by somebody


class StopRequest:
    """Remembers the first signal of :data:`STOP_SIGNALS`; a later one ends the process at once.

    One thread waits for the signals and all others block them. Children inherit the blocked mask,
    whoever starts them, and so survive a signal that is sent to every process.

    Attributes:
        signal: number of the signal received, 0 for none.
    """

    def __init__(self) -> None:
        self.signal, self._since = 0, 0.0
        self._handlers: dict[signal.Signals, Any] = {}  # of before
        self._mask: set[int] = set()  # of before
        self._waiting: threading.Thread | None = None
        self._ignoring = False

    def listen(self) -> None:
        """Take the signals from now on; only in a process's main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        # for threads that libraries have started before, which do not block the signals
        self._handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        self._mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS))
        # Python unblocks SIGTERM in the thread that starts its resource tracker, which would be the
        # thread that goes on to start a child: start it now, and block SIGTERM again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        atexit.unregister(_kill_daemons)  # registered last, it runs before multiprocessing's own
        atexit.register(_kill_daemons)
        self._waiting = threading.Thread(target=self._wait, name="stop signals", daemon=True)
        self._waiting.start()

    def ignore_signals(self) -> None:
        """Take no further notice of them, as everything is saved and the process about to end."""
        self._ignoring = True
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Put back what handled the signals before."""
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        assert waiting.ident is not None
        signal.pthread_kill(waiting.ident, STOP_SIGNALS[0])  # wakes it up
        waiting.join()
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _wait(self) -> None:
        while True:
            number = signal.sigwait(STOP_SIGNALS)
            if self._waiting is None:
                return
            self._receive(number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._ignoring or (self.signal and time.monotonic() - self._since < REPEAT_SECONDS):
            return
        if self.signal:
            os.write(2, f"{name} again: ending at once\n".encode())
            os._exit(128 + number)
        self.signal, self._since = number, time.monotonic()
        os.write(2, f"{name}: stopping within two steps; a second signal ends at once\n".encode())


def _kill_daemons() -> None:
    """End children as multiprocessing does at exit, which sends them SIGTERM and waits for them.

    They block SIGTERM, and it would wait forever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for a worker's crash
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
