"""Write the configs of a sweep: one job with some of its values varied."""

import itertools
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from ..checks.job import check_config
from ..config.differences import differences, flatten
from ..config.job_config import JobConfig
from ..config.manager import SuperpositionConfigManager, read_toml
from ..config.schedule import build_schedule
from ..config.values import kinds_of, type_of
from ..errors import ArgumentError
from .plan import default_ranks

BAG_SIZE, STEP_RATIO, STEPS = (
    f"superposition.{key}" for key in ("bag_size", "step_ratio", "steps")
)
BASELINE = "baseline"
_KINDS = {key: type_of(kind) for key, kind in kinds_of(JobConfig).items()}
_ROOT = Path(__file__).parents[4]  # the folder of a checkout


@dataclass
class Point:
    """One run of a sweep.

    Attributes:
        name: name of its folder.
        values: value of each varied key; None for keys without meaning in a baseline.
        steps: steps of the whole run.
        last_logged: the last step that is logged.
        last_validated: the last step with a validation; 0 without any.
        toml: content of its config file.
        config: the resolved config.
    """

    name: str
    values: dict[str, Any]
    steps: int
    last_logged: int
    last_validated: int
    toml: dict[str, Any]
    config: JobConfig


def make(folder: Path, base: str, vary: dict[str, list[str]], arguments: list[str]) -> list[Point]:
    """Write the configs of a sweep: FOLDER/0.toml, FOLDER/1.toml and so on, and sweep.json.

    Args:
        folder: folder of the sweep.
        base: the TOML file of the job.
        vary: values of each key as on the command line. Every combination is a run; all
            combinations without superposition are one run, the baseline.
        arguments: further arguments of all runs.

    Raises:
        ArgumentError: for a config that cannot run, or a folder with another sweep.
    """
    folder = folder.absolute()
    points: dict[str, Point] = {}
    for values in itertools.product(*vary.values()):
        point = _point(folder, base, dict(zip(vary, values, strict=True)), arguments)
        points.setdefault(point.name, point)
    runs = [
        {
            "name": point.name,
            "values": point.values,
            "steps": point.steps,
            "last_logged": point.last_logged,
            "last_validated": point.last_validated,
            "folder": point.toml["job"]["dump_folder"],
        }
        for point in points.values()
    ]
    content = {"base": base, "arguments": arguments, "vary": vary, "runs": runs}
    files = {folder / "sweep.json": json.dumps(content, indent=2) + "\n"}
    for number, point in enumerate(points.values()):
        head = f"# Run {number}, {point.name}, of a sweep over {base}; made by `tst sweep make`\n\n"
        files[folder / f"{number}.toml"] = head + tomli_w.dumps(point.toml)
    for file, text in files.items():
        if file.exists() and _after_head(file.read_text()) != _after_head(text):
            raise ArgumentError(
                f"{folder} holds another sweep: {file.name} differs. Give a new folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        file.write_text(text)
    return list(points.values())


def _after_head(text: str) -> str:
    """Return a text without its first line; in a config, that line says what wrote it."""
    return text.partition("\n")[2]


def _point(folder: Path, base: str, values: dict[str, str], arguments: list[str]) -> Point:
    overrides = list(arguments)
    for key, value in values.items():
        if _KINDS.get(key) == list[str]:  # on the command line, its items have no brackets
            value = value.removeprefix("[").removesuffix("]")
        overrides.append(f"--{key}={value}")
    for given, other in ((STEP_RATIO, STEPS), (STEPS, STEP_RATIO)):
        if given in values:
            overrides.append(f"--{other}=None")  # only one of the two may be set
    config = SuperpositionConfigManager().parse_args([f"--job.config_file={base}", *overrides])
    check_config(config, default_ranks(config))
    off = not build_schedule(config).enabled
    resolved = dict(flatten(config.to_dict()))
    typed = {
        key: None if off and key.startswith("superposition.") else resolved[key] for key in values
    }
    names = [
        f"{key.rpartition('.')[2]}={value_in_words(value, '-')}"
        for key, value in typed.items()
        if value is not None
    ]
    name = ",".join([BASELINE, *names] if off else names)
    overrides.append(f"--job.dump_folder={folder / 'runs' / name}")
    toml = read_toml(base)
    for key, (_, value) in differences([base], [base, *overrides]).items():
        *sections, last = key.split(".")
        table = toml
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = value
        if value is None:
            del table[last]
    if off:
        toml.pop("superposition", None)
    steps, log_freq = config.training.steps, config.metrics.log_freq
    boundary = build_schedule(config).boundary
    last_logged = max(1, steps // log_freq * log_freq, min(steps, boundary + 1) if boundary else 0)
    validation = config.validation
    last_validated = max(1, steps // validation.freq * validation.freq) if validation.enable else 0
    return Point(name, typed, steps, last_logged, last_validated, toml, config)


def value_in_words(value: Any, between: str = ", ") -> str:
    """Return a value as text for people, with the items of a list joined by ``between``."""
    return between.join(map(str, value)) if isinstance(value, list) else f"{value}"


def read_sweep(folder: Path) -> dict[str, Any]:
    """Return the content of the sweep.json in a folder.

    Raises:
        ArgumentError: if it is missing or damaged.
    """
    path = folder / "sweep.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ArgumentError(
            f"{folder} holds no sweep: {path.name} is missing. Make one with `tst sweep make`"
        ) from None
    except ValueError as error:
        raise ArgumentError(f"{path} is damaged: {error}. Make the sweep anew") from error


def parse_vary(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each key, from texts such as "superposition.bag_size=4,[8,4,2]".

    Raises:
        ArgumentError: for no text, a text of another form, or a key that is given twice.
    """
    if not texts:
        raise ArgumentError("--vary is missing: give at least one --vary section.key=value,value")
    vary: dict[str, list[str]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if not values or "." not in key:
            raise ArgumentError(f"--vary {text}: must be section.key=value,value")
        if key in vary:
            raise ArgumentError(
                f"--vary {text}: {key} is given twice. Put all its values into one --vary"
            )
        vary[key] = re.split(r",(?![^\[]*\])", values)  # not at a comma inside a list
    return vary


def submission(folder: Path, runs: int) -> str | None:
    """Return the command that submits a sweep to Slurm; None outside of a checkout.

    Args:
        folder: folder of the sweep.
        runs: number of runs of the sweep.
    """
    script = _ROOT / "scripts/slurm/train.sbatch"
    if not script.is_file():
        return None
    return (
        f"CONFIG_FILE={shlex.quote(str(folder))} sbatch --array=0-{runs - 1} "
        f"{shlex.quote(os.path.relpath(script))}"
    )
