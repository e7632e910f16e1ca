"""The command ``tst``, or ``python -m torchtitan.experiments.tst``: see :mod:`.commands`."""

import ast
import difflib
import itertools
import os
import sys
from pathlib import Path

import torch

from . import commands
from .engine import is_03
from .resilience.reporting import EXIT_CODE

_COMMANDS = list(itertools.chain(*commands.COMMANDS.values()))
_HINTS = (
    "tst COMMAND --help                example and options of a command",
    "tst --tyro-print-completion bash  shell completion for bash, zsh or tcsh",
)
_ON_CPU = ("plan", "dry-run")  # they simulate all GPUs on the CPU


def main() -> None:
    """Run a command; a user's error is printed in one line, with exit code 2."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return
    if name not in _COMMANDS and not name.startswith("--tyro-"):
        near = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(_COMMANDS)}"
        print(f"tst {name}: no such command; {hint}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):  # as python -m does, for a job's extensions
        sys.path.insert(0, here)
    if name in _ON_CPU:
        _hide_accelerators()
    if is_03():
        from .titan03.cpu import enable_cpu_if_alone
    else:
        from .upstream.cpu import enable_cpu_if_alone
    enable_cpu_if_alone()
    from .commands import running

    if name in _COMMANDS:
        running.run(name, arguments)
    else:
        running.complete(_COMMANDS, sys.argv[1:])


def _hide_accelerators() -> None:
    """Restart this process without GPUs if there are any: TorchTitan has already found them."""
    if torch.accelerator.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        command = [sys.executable, "-m", str(__package__), *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def _overview() -> str:
    """Return the help of ``tst`` itself, with the first line of each command's docstring."""
    lines = ["usage: tst COMMAND ...", "", "Token Superposition Training for TorchTitan."]
    for title, names in commands.COMMANDS.items():
        lines += ["", f"{title}:"]
        for name in names:
            path = Path(commands.__path__[0], f"{name.replace('-', '_')}.py")
            purpose = ast.get_docstring(ast.parse(path.read_text())) or ""
            lines.append(f"  {name:13}{purpose.partition(chr(10))[0]}")
    return "\n".join([*lines, "", *_HINTS])


if __name__ == "__main__":
    main()
