"""Errors that a user can fix; they are printed in one line and without a traceback."""


class UserError(Exception):
    """An error whose message says what is wrong, where, what is allowed, and what to do.

    Attributes:
        title: title before the message; "" for the title of the program that prints it.
        exit_code: exit code of the process.
    """

    title: str = ""
    exit_code: int = 2


class ArgumentError(UserError, ValueError):
    """A wrong argument of a command or a function."""


class ConfigError(UserError, ValueError):
    """A job config that cannot run; the message names the key, its value and what is allowed."""

    title = "config error"

    def __init__(self, key: str, value: object, allowed: str):
        super().__init__(f"{key} = {value!r}: {allowed}")


class ConfigTextError(ConfigError):
    """A job config that cannot run, for a reason that is not the value of a single key."""

    def __init__(self, text: str):
        ValueError.__init__(self, text)


def in_one_line(error: BaseException) -> str:
    """Return the type and the message of an exception, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
