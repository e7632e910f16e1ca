"""The report of scripts/check_gpu.py: its parts, their figures and targets."""

import json
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOG_LINES = 200  # last lines of a log in the report


@dataclass(frozen=True)
class Target:
    """A figure and its limit."""

    what: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool:
        """Whether the figure is within its limit; false for NaN."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return self.at_least is not None and self.value >= self.at_least

    def __str__(self) -> str:
        limit = (
            f"at most {self.at_most:g}" if self.at_least is None else f"at least {self.at_least:g}"
        )
        return f"{self.what}: {self.value:.4g} ({limit})"


@dataclass(frozen=True)
class Part:
    """A part of the check: one command.

    Attributes:
        name: name of its folder.
        title: title in the report.
        command: the command, run in the repository's root.
        seconds: time limit.
        targets: reads its figures from its folder.
        table: the file in its folder with the result as text; a JSON file of the same name has the
            numbers.
    """

    name: str
    title: str
    command: list[str]
    seconds: float
    targets: Callable[[Path], list[Target]]
    table: str


@dataclass
class Outcome:
    """The result of a part: how it failed ("" if it did not), and its figures."""

    part: Part
    failure: str = ""
    seconds: float = 0.0
    targets: list[Target] = field(default_factory=list)

    def falls_short(self, tiny: bool) -> bool:
        """Return whether the part failed or missed a target; tiny shapes have no targets."""
        return bool(self.failure) or (not tiny and not all(target.met for target in self.targets))


def machine() -> dict[str, str]:
    """Return the machine and the software versions."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    gpus = output_of(query).splitlines()
    commit = output_of(["git", "rev-parse", "HEAD"]) or "unknown"
    if output_of(["git", "status", "--porcelain", "--untracked-files=no"]):
        commit += ", with changes"
    return {
        "GPU (memory, driver)": "; ".join(gpus) or "none",
        "torch": metadata.version("torch"),
        "torchtitan": metadata.version("torchtitan"),
        "Python": platform.python_version(),
        "commit": commit,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def numbers_of(part: Part, folder: Path) -> Path:
    return (folder / part.table).with_suffix(".json")


def write_report(output: Path, about: dict[str, str], outcomes: list[Outcome], tiny: bool) -> None:
    """Write ``report.md`` and ``results.json`` with all figures of the parts that have run so far.

    Args:
        output: folder of the results.
        about: facts of the machine.
        outcomes: results of the parts so far.
        tiny: whether shapes are tiny, so that the figures have no meaning.
    """
    lines = ["# GPU check", ""]
    if tiny:
        lines += ["**Tiny shapes: the commands run, but the figures have no meaning.**", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "| part | result | seconds | figures |", "| --- | --- | --- | --- |"]
    lines += list(summary(outcomes, tiny))
    results = []
    for outcome in outcomes:
        part, folder = outcome.part, output / outcome.part.name
        table, log, numbers = folder / part.table, folder / "log.txt", numbers_of(part, folder)
        lines += ["", f"## {part.title}", "", "```text"]
        if table.exists() and table != log:
            lines += table.read_text().splitlines()
        if table == log or outcome.failure:
            lines += log.read_text().splitlines()[-LOG_LINES:]
        lines.append("```")
        results.append(
            {
                "part": part.name,
                "command": shlex.join(part.command),
                "failure": outcome.failure,
                "seconds": outcome.seconds,
                "targets": [asdict(target) | {"met": target.met} for target in outcome.targets],
                "figures": read(numbers) if numbers.exists() else None,
            }
        )
    (output / "report.md").write_text("\n".join(lines) + "\n")
    content = json.dumps({"machine": about, "tiny": tiny, "parts": results}, indent=1)
    (output / "results.json").write_text(content + "\n")


def summary(outcomes: list[Outcome], tiny: bool) -> Iterator[str]:
    for outcome in outcomes:
        figures = "<br>".join(
            f"{target}{'' if tiny or target.met else ' **missed**'}" for target in outcome.targets
        )
        result = verdict(outcome, tiny)
        yield f"| {outcome.part.name} | {result} | {outcome.seconds:.0f} | {figures} |"


def verdict(outcome: Outcome, tiny: bool) -> str:
    if outcome.failure:
        return f"failed: {outcome.failure}"
    return "missed a target" if outcome.falls_short(tiny) else "ran" if tiny else "met"
