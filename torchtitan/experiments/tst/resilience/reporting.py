"""How an error that ends a program is said: in one line, without a traceback, once for all ranks.

All ranks find the same error, as a rule. Rank 0 says it; another rank speaks if rank 0 has not said
the same. Under :mod:`..launch` they leave it to the launcher to say, whose output is always shown.
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

EXIT_CODE = UserError.exit_code  # of a process whose error is said
UNDER_LAUNCH = "TST_LAUNCH"  # in the environment of the processes that .launch starts
PATIENCE = 20.0  # seconds in which rank 0 may find the same error

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # which the launcher reads after a failure


@contextmanager
def errors_in_one_line(
    title: str = "error", end: Callable[[str, int], NoReturn] | None = None
) -> Iterator[None]:
    """End the process with one line for an error that the user can fix: around every ``main``.

    Args:
        title: of errors without a title of their own, such as those of the operating system.
        end: ends the process, given the line and the exit code; by default it prints the line. A
            rank ends by :func:`end_with`.
    """
    try:
        yield
    except UserError as error:
        (end or print_and_exit)(f"{error.title or title}: {error}", error.exit_code)
    except OSError as error:
        (end or print_and_exit)(f"{title}: {error}", EXIT_CODE)


def print_and_exit(error: str, exit_code: int = EXIT_CODE) -> NoReturn:
    """End a process that is no rank with an error."""
    print(error, file=sys.stderr, flush=True)
    sys.exit(exit_code)


def end_with(error: str, exit_code: int = EXIT_CODE) -> NoReturn:
    """End this rank with an error, and say it unless rank 0 says the same.

    Args:
        error: one line.
        exit_code: of the process.
    """
    rank = int(os.environ.get("RANK", 0))
    file = os.environ.get(_ERROR_FILE)
    if file:
        Path(file).unlink(missing_ok=True)  # upstream has written its traceback
    if rank == 0:
        _say(error, file)
        _tell_others(error)
    elif not _rank_0_says(error):
        _say(f"rank {rank}: {error}", file)
    sys.exit(exit_code)


def _say(text: str, error_file: str | None) -> None:
    if error_file and os.environ.get(UNDER_LAUNCH):
        _beside(error_file).write_text(text)
    else:
        print(text, file=sys.stderr, flush=True)


def _beside(error_file: str) -> Path:
    """What a process has to say, beside the file in which torchrun expects a traceback."""
    return Path(error_file).with_name("error.txt")


def texts_of(error_files: Iterable[str]) -> list[str]:
    """What processes have left for their launcher to say.

    Args:
        error_files: torchrun's, of all processes.
    """
    return [path.read_text() for path in map(_beside, error_files) if path.exists()]


def is_all(exit_codes: Iterable[int]) -> bool:
    """Whether nothing else has gone wrong.

    Args:
        exit_codes: of all processes; one that has not failed has been ended by a signal.
    """
    return {code for code in exit_codes if code >= 0} == {EXIT_CODE}


def _store() -> dist.Store | None:
    """That of torchrun, which all ranks reach before there is a process group; None without."""
    if "RANK" not in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))


def _key() -> str:
    return f"tst/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _tell_others(error: str) -> None:
    with suppress(dist.DistError):  # they are gone
        if store := _store():
            store.set(_key(), error)


def _rank_0_says(error: str) -> bool:
    """Whether rank 0 ends with the same error."""
    end = time.monotonic() + PATIENCE
    try:
        store = _store()
        while store is not None and time.monotonic() < end:
            if store.check([_key()]):
                return store.get(_key()) == error.encode()
            time.sleep(0.05)
    except dist.DistError:
        return True  # the launcher of rank 0 is gone: that rank has failed, and has said why
    return False
