"""Check the type, choice and range of every key of a job config, from its annotation.

Upstream does not check the values of a TOML. The code that uses them fails later.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ..errors import ConfigError
from .allowed import Allowed
from .old_keys import old_keys_error
from .upstream_ranges import UPSTREAM_RANGES

_WORDS: dict[Any, str] = {
    bool: "true or false",
    str: "a string",
    int: "an integer",
    float: "a number",
    list[str]: "a list of strings",
    list[int]: "a list of integers",
    list[float]: "a list of numbers",
    list[list[str]]: "a list of lists of strings",
}


def kinds_of(config_cls: Any, prefix: str = "") -> dict[str, Any]:
    """Return the annotation of every key of a config class, by keys such as ``training.steps``."""
    kinds: dict[str, Any] = {}
    for f in fields(config_cls):
        key = f"{prefix}{f.name}"
        kinds |= kinds_of(f.type, f"{key}.") if _is_section(f.type) else {key: f.type}
    return kinds


def check_values(job_config: Any) -> None:
    """Check every value of a job config on its own.

    Raises:
        ConfigError: if a value is not allowed.
    """
    for key, kind in kinds_of(type(job_config)).items():
        value = job_config
        for name in key.split("."):
            value = getattr(value, name)
        check_value(key, kind, value)


def check_toml(config_cls: type, toml: dict[str, Any]) -> None:
    """Check every key and value of a TOML file.

    Args:
        config_cls: config class of the file.
        toml: content of the file.

    Raises:
        ConfigError: if a key is unknown or a value is not allowed. Keys of older versions of
            TorchTitan are named all at once, each with its new name.
    """
    kinds = kinds_of(config_cls)
    if error := old_keys_error(dict(_leaves(toml)), kinds):
        raise error
    _check_section(config_cls, "", toml)


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key and value of everything that is not a section, in unknown sections too."""
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _check_section(section: Any, prefix: str, table: dict[str, Any]) -> None:
    """Check the keys and values of a section and its subsections."""
    known = {f.name: f.type for f in fields(section)}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise unknown_key_error(key, value, known)
        if not _is_section(known[name]):
            check_value(key, known[name], value)
        elif isinstance(value, dict):
            _check_section(known[name], f"{key}.", value)
        else:
            raise ConfigError(key, value, f"must be a section, [{key}]")


def unknown_key_error(key: str, value: object, known: Iterable[str]) -> ConfigError:
    """Return the error of an unknown key, with the name that is closest.

    Args:
        key: the unknown key.
        value: its value.
        known: names of the keys in the same section.
    """
    if error := old_keys_error({key: value}, ()):
        return error
    section, _, name = key.rpartition(".")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    what = "key" if section or not isinstance(value, dict) else "section"
    return ConfigError(key, value, f"unknown {what}; {hint}known {what}s are {', '.join(known)}")


def check_value(key: str, kind: Any, value: Any) -> None:
    """Check the value of a key on its own.

    Args:
        key: the key, such as ``training.steps``.
        kind: its annotation.
        value: its value.

    Raises:
        ConfigError: if the value is not allowed.
    """
    if not fits(value, type_of(kind)):
        raise ConfigError(key, value, f"must be {_words(type_of(kind))}")
    allowed = range_of(key, kind)
    if allowed and value is not None and not allowed.has(value):
        raise ConfigError(key, value, f"must be {allowed.text}")


def type_of(kind: Any) -> Any:
    """Return the type of an annotation, without its range."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def range_of(key: str, kind: Any) -> Allowed | None:
    """Return the range of a key, from its annotation or, for TorchTitan's keys, from the table."""
    ranges = [part for part in get_args(kind)[1:] if isinstance(part, Allowed)]
    return ranges[0] if ranges else UPSTREAM_RANGES.get(key)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value fits an annotation; any value fits a kind that is not checked here."""
    origin = get_origin(kind)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in get_args(kind))
    if origin is list:
        return isinstance(value, list) and all(fits(part, *get_args(kind)) for part in value)
    if kind in (int, float):
        numbers = (int, float) if kind is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (bool, str, type(None)) else True


def _words(kind: Any) -> str:
    """Return the name of a kind of value for an error, such as "a number"."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        if float in options:
            options = [option for option in options if option is not int]
        return " or ".join(map(_words, options))
    return _WORDS.get(kind, str(kind))
