"""Run the tutorial, docs/tutorial.md, from its first command to its last.

    python scripts/run_tutorial.py                       in a copy of this checkout; installs first
    python scripts/run_tutorial.py --reuse-environment   with the packages of this Python instead

It stops at the first command that fails, or whose output is not what the page shows. How it reads
the page:

- A block after a paragraph that ends with "as `FILE`:" is written to FILE. After one that ends with
  "to the end of `FILE`:", it is added to the file.
- Each line of a bash block is a command. The commands share their folder and their environment.
- A text block shows lines of the output of the bash block before it. Each line must occur there, in
  any order. A number stands for any number, and "..." for any text.
- A command must succeed. If its text block has a line that begins with "error:" or a word and
  "error:", it must fail.
- A line "^C" in a text block: Ctrl-C is pressed after the output of the line before it.
- Blocks of other languages, or of none, are for reading only.
- The commands under the heading "Install" are skipped with --reuse-environment. Nothing is run from
  the heading "On GPUs" on.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from command_line import documented_parser

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
INSTALL, END = "Install", "On GPUs"
NOT_COPIED = (".git", ".venv", "outputs", "__pycache__", "*.egg-info", ".*_cache")

_FENCE = re.compile(r"```(\w*)$")
_FILE = re.compile(r"(as|to the end of) `([^`\s]+)`:$")
_ERROR = re.compile(r"(\w+ )?error:")
_CTRL_C = "^C"
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = re.compile(r"[-+]?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A block of code of the page."""

    language: str
    text: str
    before: str  # the paragraph right before it
    section: str  # the heading of level 2 that it is under, without number


class File(NamedTuple):
    """A file that the page shows."""

    name: str
    text: str
    is_added: bool  # to a file that is there

    def write(self, folder: Path) -> None:
        """Write it below the folder."""
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if self.is_added else "w") as file:
            file.write(self.text)


class Commands(NamedTuple):
    """A bash block, and what the page shows of its output."""

    lines: list[str]
    shown: list[str]
    section: str

    @property
    def fails(self) -> bool:
        """Whether the last command must fail."""
        return any(_ERROR.match(line) or line == _CTRL_C for line in self.shown)

    @property
    def stops_after(self) -> str | None:
        """The line of output before Ctrl-C ends the last command, if the page shows that."""
        return self.shown[self.shown.index(_CTRL_C) - 1] if _CTRL_C in self.shown else None


class TutorialError(Exception):
    """A command failed, or the page shows what it did not print."""


def read_blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of code of a page.

    Raises:
        TutorialError: for a block that does not end.
    """
    language, text, before, section, in_paragraph = None, [], "", "", False
    for line in page.splitlines():
        fence = _FENCE.match(line)
        if language is not None and not fence:
            text.append(f"{line}\n")
        elif language is not None:
            yield Block(language, "".join(text), before, section)
            language, text, before = None, [], ""
        elif fence:
            language = fence[1]
        elif line.startswith("## "):
            section = line.lstrip("# ").lstrip("0123456789. ")
        elif line.strip():
            before = f"{before} {line}" if in_paragraph else line
        in_paragraph = language is None and not fence and bool(line.strip())
    if language is not None:
        raise TutorialError(f"the last block has no end: {text[:1]}")


def read_steps(page: str) -> list[File | Commands]:
    """Return the files and the commands of a page, in their order.

    Raises:
        TutorialError: for a page that cannot be run.
    """
    steps: list[File | Commands] = []
    for block in read_blocks(page):
        if block.section.startswith(END):
            break
        if found := _FILE.search(block.before):
            steps.append(File(found[2], block.text, found[1] != "as"))
        elif block.language == "bash":
            lines = block.text.replace("\\\n", " ").splitlines()
            commands = [line for line in lines if line.strip() and not line.startswith("#")]
            steps.append(Commands(commands, [], block.section))
        elif block.language == "text":
            before = next((step for step in reversed(steps) if isinstance(step, Commands)), None)
            if before is None:
                raise TutorialError(f"no command is before the output {block.text!r}")
            before.shown.extend(filter(str.strip, block.text.splitlines()))
    return steps


def plain(text: str) -> str:
    """Return text with 0 for each number, single spaces and no colors."""
    return " ".join(_NUMBER.sub("0", _COLOR.sub("", text)).split())


def missing_lines(shown: list[str], output: str) -> list[str]:
    """Return the lines shown that the output does not have, modulo numbers and "..."."""
    printed = [plain(line) for line in re.split(r"[\r\n]+", output)]
    missing = []
    for line in shown:
        parts = [re.escape(plain(part)) for part in line.split("...")]
        pattern = re.compile(".*".join(parts))
        if not any(pattern.search(candidate) for candidate in printed):
            missing.append(line)
    return missing


class Shell:
    """Runs commands in bash, each in the folder and the environment that the last one left.

    Args:
        folder: of the first command.
        log: a file for all commands and their output.
        environment: of the first command.
    """

    def __init__(self, folder: Path, log: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self._log = log
        self._environment = environment
        self._state = log.with_suffix(".state")
        self._state.unlink(missing_ok=True)
        log.unlink(missing_ok=True)

    def run(self, command: str, stops_after: str | None = None) -> tuple[int, str]:
        """Run a command; return its exit code and its output.

        Args:
            command: in bash.
            stops_after: a line of output. After this line, Ctrl-C ends the command.
        """
        state = shlex.quote(str(self._state))
        script = (
            f"[[ ! -f {state} ]] || . {state}\neval {shlex.quote(command)}\ncode=$?\n"
            f"{{ export -p; printf 'cd %q\\n' \"$PWD\"; }} > {state}\nexit $code\n"
        )
        lines = []
        with (
            self._log.open("a", buffering=1) as log,
            subprocess.Popen(
                ["bash", "-c", script],
                cwd=self.folder,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_heed_ctrl_c,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process,
        ):
            log.write(f"$ {command}\n")
            for line in process.stdout or ():
                log.write(line)
                lines.append(line)
                if stops_after and not missing_lines([stops_after], line):
                    os.killpg(process.pid, signal.SIGINT)
                    stops_after = None
        if self._state.exists():
            self.folder = Path(shlex.split(self._state.read_text().splitlines()[-1])[1])
        return process.returncode, "".join(lines)


def _heed_ctrl_c() -> None:
    """Let SIGINT end this process, which a job in the background of a shell ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_commands(commands: Commands, shell: Shell, number: int, count: int) -> None:
    """Run the commands of a block, and compare their output with what the page shows.

    Args:
        commands: of the block.
        shell: where they run.
        number: of the block, for the progress.
        count: of the blocks.

    Raises:
        TutorialError: for a command that fails, or an output that lacks a line.
    """
    outputs = []
    for line in commands.lines:
        is_last = line is commands.lines[-1]
        must_fail = is_last and commands.fails
        print(f"[{number}/{count}] {line}", end=" ", flush=True)
        begin = time.monotonic()
        code, output = shell.run(line, commands.stops_after if is_last else None)
        print(f"({time.monotonic() - begin:.0f} s)", flush=True)
        outputs.append(output)
        if bool(code) != must_fail:
            expected = "must fail" if must_fail else "must succeed"
            raise TutorialError(f"$ {line}\n{output}\nThe command ended with {code}: it {expected}")
    shown = [line for line in commands.shown if line != _CTRL_C]
    if missing := missing_lines(shown, output := "".join(outputs)):
        lacks = "\n".join(missing)
        raise TutorialError(f"$ {line}\n{output}\nThe output lacks what the page shows:\n{lacks}")


def run_page(page: str, folder: Path, log: Path, reuse_environment: bool = False) -> float:
    """Run a page in a folder; return the seconds that it took.

    Args:
        page: in Markdown.
        folder: of the first command.
        log: a file for all commands and their output.
        reuse_environment: use the packages of this Python, and skip the section "Install".

    Raises:
        TutorialError: at the first command that fails, or whose output is not the page's.
    """
    begin = time.monotonic()
    steps = read_steps(page)
    environment = dict(os.environ)
    environment.pop("VIRTUAL_ENV", None)
    if reuse_environment:
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        steps = [s for s in steps if isinstance(s, File) or s.section != INSTALL]
    shell = Shell(folder, log, environment)
    count = sum(isinstance(step, Commands) for step in steps)
    number = 0
    for step in steps:
        if isinstance(step, File):
            step.write(shell.folder)
        else:
            number += 1
            run_commands(step, shell, number, count)
    return time.monotonic() - begin


def main() -> int:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        help="a checkout to run in, which keeps what the page makes; default: a temporary copy",
    )
    parser.add_argument(
        "--reuse-environment",
        action="store_true",
        help="use the packages of this Python, and skip the section Install",
    )
    args = parser.parse_args()
    temporary = None if args.folder else Path(tempfile.mkdtemp(prefix="tutorial-"))
    try:
        run_in(temporary, args)
    except TutorialError as error:
        print(f"\n{error}", file=sys.stderr)
        if temporary:
            print(f"The copy and its tutorial.log stay in {temporary}", file=sys.stderr)
        return 1
    if temporary:
        shutil.rmtree(temporary)
    return 0


def run_in(temporary: Path | None, args: argparse.Namespace) -> None:
    """Run the page in the folder of the arguments, or else in a copy in the temporary folder."""
    folder = args.folder
    if temporary:
        folder = temporary / "checkout"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    log = (temporary or folder).absolute() / "tutorial.log"
    print(f"Running {PAGE.relative_to(ROOT)} in {folder}; the output is in {log}", flush=True)
    seconds = run_page(PAGE.read_text(), folder, log, args.reuse_environment)
    print(f"All of it ran, in {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(main())
