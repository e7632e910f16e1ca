"""The command line of a job: lists of numbers, and errors of one line instead of tyro's boxes."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any, get_args

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..errors import ConfigTextError
from .values import check_value, fits, kinds_of, type_of, unknown_key_error


def register_stages(registry: ConstructorRegistry) -> None:
    """Let tyro parse a number or a list of numbers, one for each stage: "8,4,2" or "[8, 4, 2]"."""

    @registry.primitive_rule
    def one_or_list(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if not (number := _type_of_number(info.type)):
            return None
        name, none = number.__name__.upper(), type(None) in get_args(info.type)
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{'{None}|' if none else ''}{name}|{name},{name},...",
            instance_from_str=lambda args: _one_or_list(args[0], info.type),
            is_instance=lambda value: fits(value, info.type),
            str_from_instance=lambda value: [
                ",".join(map(str, value)) if isinstance(value, list) else f"{value}"
            ],
        )


def _type_of_number(kind: Any) -> type | None:
    """Return int or float for an annotation of a number or a list of them; None for others."""
    lists = {int: list[int], float: list[float]}
    options = get_args(kind)
    return next((n for n in lists if n in options and lists[n] in options), None)


def _one_or_list(text: str, kind: Any) -> Any:
    """Parse a number or a list of numbers.

    Args:
        text: such as "8", "8,4,2" or "[8, 4, 2]".
        kind: annotation of the key.

    Raises:
        ValueError: if the text is neither.
    """
    number = _type_of_number(kind)
    assert number is not None
    if text == "None" and type(None) in get_args(kind):
        return None
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    values = [number(part) for part in inner.split(",")]
    return values if len(values) > 1 or inner != text else values[0]


@contextmanager
def refused_in_one_line(args: Sequence[str], config_cls: Callable[[], type]) -> Iterator[None]:
    """Raise a :class:`ConfigError` where tyro would print a box and exit.

    Args:
        args: arguments of the command line.
        config_cls: returns the config class of these arguments. It is called after parsing, because
            it is not known before.
    """
    box = StringIO()
    try:
        with redirect_stderr(box):
            yield
    except SystemExit as error:
        if error.code != 2:
            raise
        _find_fault(args, kinds_of(config_cls()))
        raise ConfigTextError(f"command line: {_text_of(box.getvalue())}") from None
    except AssertionError as error:  # from a section's __post_init__
        _find_fault(args, kinds_of(config_cls()))
        raise ConfigTextError(f"command line: {error}") from None


def _find_fault(args: Sequence[str], kinds: dict[str, Any]) -> None:
    """Raise the error of the first argument with an unknown key or a value that is not allowed."""
    for number, arg in enumerate(args):
        if not arg.startswith("--") or "." not in arg:
            continue
        name, equals, text = arg[2:].partition("=")
        key = name.replace("-", "_")
        if not equals and number + 1 < len(args) and not args[number + 1].startswith("--"):
            text = args[number + 1]
        is_switch = kinds.get(key, kinds.get(re.sub(r"\.no_(?=\w+$)", ".", key))) is bool
        if is_switch:
            if equals:
                raise ConfigTextError(
                    f"{arg}: a switch takes no value; use --{key} for true, "
                    f"--{'.no-'.join(key.rsplit('.', 1))} for false"
                )
        elif key not in kinds:
            section = key.rpartition(".")[0]
            known = [k.rpartition(".")[2] for k in kinds if k.rpartition(".")[0] == section]
            given = text if equals or text else True
            raise unknown_key_error(key, given, known or {k.split(".")[0] for k in kinds})
        elif equals or text:
            check_value(key, kinds[key], _value(text, type_of(kinds[key])))


def _value(text: str, kind: Any) -> Any:
    """Parse the value of an argument; return the text itself if it is not of its kind."""
    options = get_args(kind) or (kind,)
    if _type_of_number(kind):
        try:
            return _one_or_list(text, kind)
        except ValueError:
            return text
    if text == "None" and type(None) in options:
        return None
    if list[str] in (kind, *options):
        return text.split(",")
    for number in (int, float):
        if number in options:
            try:
                return number(text)
            except ValueError:
                pass
    return text


def _text_of(box: str) -> str:
    """Return the text of tyro's box, without its frame, its title, and the help below it."""
    lines = [line.strip(" │╭╮╰╯─-") for line in box.splitlines()]
    _, *said = filter(None, lines)
    return " ".join(
        re.split("Argument helptext:|Perhaps you meant|For full", " ".join(said))[0].split()
    )
