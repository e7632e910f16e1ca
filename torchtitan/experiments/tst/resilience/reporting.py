"""Report the error that ends a program: in one line, without a traceback, once for all ranks.

Usually all ranks find the same error. Rank 0 reports it. Another rank reports its error only if
rank 0 has not reported the same one. Under :mod:`..launch` the launcher prints the reports, because
its output is always shown.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from ..errors import UserError

EXIT_CODE = UserError.exit_code  # of a process whose error is reported
UNDER_LAUNCH = "TST_LAUNCH"  # environment variable of the processes that .launch starts
PATIENCE = 20.0  # seconds to wait for rank 0 to find the same error

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # names the file that the launcher reads after a failure


@contextmanager
def errors_in_one_line(
    title: str = "error", end: Callable[[str, int], NoReturn] | None = None
) -> Iterator[None]:
    """End the process with one line for an error that the user can fix; wraps every ``main``.

    Args:
        title: title of errors without their own title, such as those of the operating system.
        end: ends the process, given the line and the exit code. By default it prints the line. For
            a rank, use :func:`end_with`.
    """
    try:
        yield
    except UserError as error:
        (end or print_and_exit)(f"{error.title or title}: {error}", error.exit_code)
    except OSError as error:
        (end or print_and_exit)(f"{title}: {error}", EXIT_CODE)


def print_and_exit(error: str, exit_code: int = EXIT_CODE) -> NoReturn:
    """Print an error and end the process; for processes that are not ranks."""
    print(error, file=sys.stderr, flush=True)
    sys.exit(exit_code)


def end_with(error: str, exit_code: int = EXIT_CODE) -> NoReturn:
    """End this rank with an error, and report it unless rank 0 reports the same.

    Args:
        error: the error in one line.
        exit_code: exit code of the process.
    """
    rank = int(os.environ.get("RANK", 0))
    file = os.environ.get(_ERROR_FILE)
    if file:
        Path(file).unlink(missing_ok=True)  # upstream has written its traceback
    if rank == 0:
        _report(error, file)
        _tell_others(error)
    elif not _rank_0_reports(error):
        _report(f"rank {rank}: {error}", file)
    sys.exit(exit_code)


def _report(text: str, error_file: str | None) -> None:
    if error_file and os.environ.get(UNDER_LAUNCH):
        _report_file(error_file).write_text(text)
    else:
        print(text, file=sys.stderr, flush=True)


def _report_file(error_file: str) -> Path:
    """Return the file of a process's report, next to the file for torchrun's traceback."""
    return Path(error_file).with_name("error.txt")


def texts_of(error_files: Iterable[str]) -> list[str]:
    """Return the reports that processes have left for their launcher.

    Args:
        error_files: torchrun's error files of all processes.
    """
    return [path.read_text() for path in map(_report_file, error_files) if path.exists()]


def is_all(exit_codes: Iterable[int]) -> bool:
    """Return whether every process that failed has reported its error.

    Args:
        exit_codes: exit codes of all processes; a negative one means that a signal ended it.
    """
    return {code for code in exit_codes if code >= 0} == {EXIT_CODE}


def _store() -> dist.Store | None:
    """Return torchrun's store; None without torchrun. It works without a process group."""
    if "RANK" not in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))


def _key() -> str:
    return f"tst/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _tell_others(error: str) -> None:
    with suppress(dist.DistError):  # the others have ended
        if store := _store():
            store.set(_key(), error)


def _rank_0_reports(error: str) -> bool:
    """Return whether rank 0 ends with the same error."""
    end = time.monotonic() + PATIENCE
    try:
        store = _store()
        while store is not None and time.monotonic() < end:
            if store.check([_key()]):
                return store.get(_key()) == error.encode()
            time.sleep(0.05)
    except dist.DistError:
        return True  # the launcher of rank 0 has ended: that rank has failed and reported why
    return False
