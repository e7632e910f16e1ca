"""Run a command: parse its arguments with tyro, and print its errors in one line."""

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import tyro

from ..engine import installed_release, is_03
from ..errors import ArgumentError
from ..resilience.reporting import errors_in_one_line, print_and_exit
from . import ON_03
from .arguments import split_overrides

_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
# Packages that only some commands need, and the extras that install them.
_EXTRAS = {
    "datatrove": "data",
    "multiprocess": "data",
    "tqdm": "data",
    "matplotlib": "demo",
    "lm_eval": "eval",
    "transformers": "eval",
}


def run(name: str, arguments: Sequence[str]) -> None:
    """Run a command.

    Args:
        name: name of the command.
        arguments: arguments, as on the command line.

    Raises:
        SystemExit: with exit code 2 for an error that the user can fix.
    """
    logger = logging.getLogger()  # torchtitan's
    logger.addFilter(_is_news)
    try:
        with errors_in_one_line(), _extras_named(name):
            _run(name, arguments)
    finally:
        logger.removeFilter(_is_news)


def _run(name: str, arguments: Sequence[str]) -> None:
    if is_03() and name not in ON_03:
        raise ArgumentError(
            f"tst {name} needs TorchTitan 0.2.2, but {installed_release()} is installed; with it, "
            f"tst has {', '.join(ON_03)}"
        )
    module = _module(name)
    if not is_03():
        from .. import models
        from ..data.text import datasets

        models.register()
        datasets.register()
    takes_job = _takes_overrides(module)
    own, overrides = split_overrides(arguments) if takes_job else (arguments, [])
    if name != "diff":  # there it separates two jobs
        overrides = [argument for argument in overrides if argument != "--"]
    tyro.cli(
        _function(module, overrides),
        prog=f"tst {name}",
        description=module.__doc__,
        args=own,
        config=_CONFIG,
    )


@contextmanager
def _extras_named(name: str) -> Iterator[None]:
    """If a command lacks a package, exit with the pip command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        extra = _EXTRAS[package]
        print_and_exit(f'tst {name} needs {package}: pip install "torchtitan-tst[{extra}]"')


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether to show a log message; the checks report a missing tokenizer better."""
    return not record.getMessage().startswith(("HF assets path ", "initial_load_model_only=True"))


def complete(names: Sequence[str], arguments: Sequence[str]) -> None:
    """Print or write tyro's shell completion of all commands.

    Args:
        names: names of the commands.
        arguments: arguments for tyro, such as ``--tyro-print-completion bash``.
    """
    names = [name for name in names if name in ON_03 or not is_03()]
    functions = {name: _function(_module(name), []) for name in names}
    tyro.extras.subcommand_cli_from_dict(
        functions, prog="tst", args=list(arguments), config=_CONFIG
    )


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


def _function(module: ModuleType, overrides: list[str]) -> Callable[..., None]:
    """Return the function of a command, with the job's arguments if it accepts them."""
    return functools.partial(module.main, overrides) if _takes_overrides(module) else module.main


def _takes_overrides(module: ModuleType) -> bool:
    return "overrides" in inspect.signature(module.main).parameters
