"""The errors of a job config."""


class ConfigError(ValueError):
    """A job config that cannot run; the message names key, value and what is allowed."""

    def __init__(self, key: str, value: object, allowed: str):
        super().__init__(f"{key} = {value!r}: {allowed}")


class ConfigTextError(ConfigError):
    """A job config that cannot run for another reason than the value of one key."""

    def __init__(self, text: str):
        ValueError.__init__(self, text)


def in_one_line(error: BaseException) -> str:
    """The type of an exception and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
