"""Errors that a user can fix, which are printed in one line and without a traceback."""


class UserError(Exception):
    """An error whose message says what is wrong, where, what is allowed, and what to do.

    Attributes:
        title: printed before the message; "" for the title of the program that prints it.
        exit_code: of the process that it ends.
    """

    title: str = ""
    exit_code: int = 2


class ArgumentError(UserError, ValueError):
    """Something that a command or a function was given, and cannot work with."""


class ConfigError(UserError, ValueError):
    """A job config that cannot run; the message names key, value and what is allowed."""

    title = "config error"

    def __init__(self, key: str, value: object, allowed: str):
        super().__init__(f"{key} = {value!r}: {allowed}")


class ConfigTextError(ConfigError):
    """A job config that cannot run for another reason than the value of one key."""

    def __init__(self, text: str):
        ValueError.__init__(self, text)


def in_one_line(error: BaseException) -> str:
    """Return the type of an exception and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
