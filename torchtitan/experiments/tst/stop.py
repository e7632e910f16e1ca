"""Stopping between two steps when asked to: SIGTERM, or SIGUSR1 as Slurm sends before a time limit.

A rank that is asked tells the others; all finish the step together, write a checkpoint and leave
with :data:`STOPPED_EXIT_CODE`, on which a batch script can queue the job again.
"""

import os
import signal
import threading
import time
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

    Attributes:
        signal: number of the signal received, 0 for none.
    """

    def __init__(self) -> None:
        self.signal, self._since = 0, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take the signals from now on; only in a process's main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def ignore_signals(self) -> None:
        """Take no further notice of them, as everything is saved and the process about to end."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Put back what handled the signals before."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signal and time.monotonic() - self._since < REPEAT_SECONDS:
            return
        if self.signal:
            os.write(2, f"{name} again: ending at once\n".encode())
            os._exit(128 + number)
        self.signal, self._since = number, time.monotonic()
        os.write(2, f"{name}: stopping after this step; a second signal ends at once\n".encode())
