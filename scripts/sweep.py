r"""Sweeps: one job with some of its values varied, as configs, as runs, as a table and a plot.

    python scripts/sweep.py make outputs/sweep train_configs/paper/270M-20k-tst.toml \
        --vary superposition.bag_size=4,6,8 --vary superposition.step_ratio=0.2,0.3
    CONFIG_FILE=outputs/sweep sbatch --array=0-5 scripts/slurm/train.sbatch
    python scripts/sweep.py run outputs/sweep
    python scripts/sweep.py table outputs/sweep

"run" is without Slurm: here, one run after the other, or --jobs at a time, each with NGPU
processes (on GPUs they share them).
"""

import argparse
import csv
import itertools
import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import tomli_w

from command_line import aligned, documented_parser
from diff_configs import differences, flatten
from torchtitan.experiments.tst import models  # noqa: F401
from torchtitan.experiments.tst.data import datasets  # noqa: F401
from torchtitan.experiments.tst.job_checks import check_config
from torchtitan.experiments.tst.job_config import (
    SuperpositionConfigManager,
    build_schedule,
    read_toml,
    superposition_section,
)
from torchtitan.experiments.tst.metrics import TRAINING_LOSS, VALIDATION_LOSS, read_metrics
from torchtitan.experiments.tst.planning import paper
from torchtitan.experiments.tst.planning.plan import default_ranks, parameters_and_flops, positive

ROOT = Path(__file__).resolve().parent.parent
BAG_SIZE, STEP_RATIO, STEPS = (
    f"superposition.{key}" for key in ("bag_size", "step_ratio", "steps")
)
BASELINE = "baseline"


@dataclass
class Point:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        values: of each varied key; None where it has no meaning without superposition.
        steps: of the whole run.
        last_logged: the last step that is logged.
        toml: its config.
    """

    name: str
    values: dict[str, Any]
    steps: int
    last_logged: int
    toml: dict[str, Any]


def make(folder: Path, base: str, vary: dict[str, list[str]], arguments: list[str]) -> list[Point]:
    """Write a sweep's configs: FOLDER/0.toml and so on, and sweep.json.

    Args:
        folder: of the sweep.
        base: TOML that all runs share.
        vary: values of each key as on the command line; every combination is a run. Those without
            superposition are all the same run, the baseline.
        arguments: of the job, for all runs.

    Raises:
        ValueError: for a config that cannot run, or a folder with another sweep.
    """
    folder, points = folder.absolute(), {}
    for values in itertools.product(*vary.values()):
        point = _point(folder, base, dict(zip(vary, values, strict=True)), arguments)
        points.setdefault(point.name, point)
    runs = [
        {
            "name": point.name,
            "values": point.values,
            "steps": point.steps,
            "last_logged": point.last_logged,
            "folder": point.toml["job"]["dump_folder"],
        }
        for point in points.values()
    ]
    content = {"base": base, "arguments": arguments, "vary": vary, "runs": runs}
    files = {folder / "sweep.json": json.dumps(content, indent=2) + "\n"}
    for number, point in enumerate(points.values()):
        head = f"# Run {number}, {point.name}, of a sweep over {base}; made by scripts/sweep.py\n\n"
        files[folder / f"{number}.toml"] = head + tomli_w.dumps(point.toml)
    for file, text in files.items():
        if file.exists() and file.read_text() != text:
            raise ValueError(f"{folder} holds another sweep ({file.name}); give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        file.write_text(text)
    return list(points.values())


def _point(folder: Path, base: str, values: dict[str, str], arguments: list[str]) -> Point:
    overrides = [*arguments, *(f"--{key}={value}" for key, value in values.items())]
    for given, other in ((STEP_RATIO, STEPS), (STEPS, STEP_RATIO)):
        if given in values:
            overrides.append(f"--{other}=None")  # one of the two says where the boundary is
    config = SuperpositionConfigManager().parse_args([f"--job.config_file={base}", *overrides])
    check_config(config, default_ranks(config))
    off = not build_schedule(config).enabled
    resolved = dict(flatten(config.to_dict()))
    typed = {
        key: None if off and key.startswith("superposition.") else resolved[key] for key in values
    }
    names = [
        f"{key.rpartition('.')[2]}={value}" for key, value in typed.items() if value is not None
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
    return Point(name, typed, steps, last_logged, toml)


@dataclass
class Result:
    """What has become of a run.

    Attributes:
        name: of the run.
        values: of each varied key; None where superposition is off.
        step: the last that is logged so far; 0 if there is none.
        steps: of the whole run.
        finished: whether the last step that is logged has been.
        training_loss: at ``step``.
        validation_loss: the last.
    """

    name: str
    values: dict[str, Any]
    step: int
    steps: int
    finished: bool
    training_loss: float | None
    validation_loss: float | None


def results(folder: Path) -> list[Result]:
    """Of all runs of a sweep, in its order."""
    found = []
    for run in read_sweep(folder)["runs"]:
        try:
            metrics = read_metrics(run["folder"])
        except FileNotFoundError:
            metrics = []
        last: dict[str, Any] = {}
        for line in metrics:
            last |= {k: line[k] for k in ("step", TRAINING_LOSS, VALIDATION_LOSS) if k in line}
        step = last.get("step", 0)
        found.append(
            Result(
                run["name"],
                run["values"],
                step,
                run["steps"],
                step >= run["last_logged"],
                last.get(TRAINING_LOSS),
                last.get(VALIDATION_LOSS),
            )
        )
    return found


def read_sweep(folder: Path) -> dict[str, Any]:
    """The content of sweep.json.

    Raises:
        ValueError: if there is none.
    """
    try:
        return json.loads((folder / "sweep.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no sweep (sweep.json)") from None


def table(folder: Path) -> None:
    """Print the results, and write table.csv and, of the finished runs, losses.png."""
    found = results(folder)
    keys = list(read_sweep(folder)["vary"])
    head = ["run", *keys, "step", "steps", "training_loss", "validation_loss"]
    rows = [
        [n, *(r.values[key] for key in keys), r.step, r.steps, r.training_loss, r.validation_loss]
        for n, r in enumerate(found)
    ]
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    cells = [head, *([_cell(value) for value in row] for row in rows)]
    print("\n".join(aligned(cells)))
    finished = [result for result in found if result.finished]
    print(f"{len(finished)} of {len(found)} runs finished; table: {folder / 'table.csv'}")
    if any(result.values[key] is not None for result in finished for key in keys):
        plot(folder, keys, finished)
        print(f"plot: {folder / 'losses.png'}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) and value > 0.1 else f"{value}"


def plot(folder: Path, keys: list[str], finished: list[Result]) -> None:
    """Loss over s for each r beside the paper's; of another sweep, over its first key."""
    from plot_surface import draw_lines, draw_surfaces

    validated = all(result.validation_loss is not None for result in finished)
    kind = "validation" if validated else "training"
    losses = [(r, r.validation_loss if validated else r.training_loss) for r in finished]
    if set(keys) == {BAG_SIZE, STEP_RATIO}:
        own = _surface(folder, losses)
        nearest = paper.nearest_surface(own.parameters, own.steps, own.weighting)
        draw_surfaces(
            {f"this sweep, {kind} loss: {own.title}": own, f"paper: {nearest.title}": nearest},
            folder / "losses.png",
        )
        return
    lines: dict[str, list[tuple[Any, float]]] = {}
    for result, loss in losses:
        x, *others = (result.values[key] for key in keys)
        label = ", ".join(
            BASELINE if value is None else f"{key} = {value}"
            for key, value in zip(keys[1:], others, strict=True)
        )
        lines.setdefault(label, []).append((BASELINE if x is None else x, loss))
    draw_lines(lines, keys[0], f"final {kind} loss", folder / "losses.png")


def _surface(folder: Path, losses: list[tuple[Result, float]]) -> paper.Surface:
    """Of a sweep over s and r, with at least one run in superposition."""
    by_place = {(r.values[STEP_RATIO], r.values[BAG_SIZE]): loss for r, loss in losses}
    baseline = by_place.pop((None, None), None)
    runs = read_sweep(folder)["runs"]
    number = next(n for n, run in enumerate(runs) if run["values"][BAG_SIZE] is not None)
    job = f"--job.config_file={folder / f'{number}.toml'}"
    config = SuperpositionConfigManager().parse_args([job])
    return paper.Surface(
        model=config.model.flavor,
        parameters=parameters_and_flops(config, config.training.seq_len)[0],
        steps=config.training.steps,
        weighting=superposition_section(config).weighting,
        baseline=baseline,
        losses=by_place,
    )


def run(folder: Path, jobs: int) -> None:
    """The runs that are not finished, ``jobs`` at a time; their output is in FOLDER/N.log then.

    Raises:
        RuntimeError: after the first that fails, once those that are going on have ended.
    """
    found = results(folder)
    waiting = [(n, result) for n, result in enumerate(found) if not result.finished]
    print(f"{len(found) - len(waiting)} of {len(found)} runs are finished", flush=True)
    failed = threading.Event()

    def run_one(number: int, name: str) -> None:
        if failed.is_set():
            return
        head, began = f"[{number + 1}/{len(found)}] {name}", time.monotonic()
        print(head, flush=True)
        environment = os.environ | {"CONFIG_FILE": str(folder.absolute() / f"{number}.toml")}
        log = folder / f"{number}.log"
        with log.open("w") if jobs > 1 else nullcontext() as output:
            code = subprocess.run(
                [ROOT / "run_train.sh"], env=environment, stdout=output, stderr=output
            ).returncode
        if code:
            failed.set()
            seen = f"; see {log}" if jobs > 1 else ""
            raise RuntimeError(f"{name} ended with exit code {code}{seen}")
        print(f"{head}: {timedelta(seconds=round(time.monotonic() - began))}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run_one, number, result.name) for number, result in waiting]:
            future.result()


def parse_vary(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition("=")
    if not values or "." not in key:
        raise argparse.ArgumentTypeError(f"{text!r}: must be section.key=value,value")
    return key, values.split(",")


def main() -> None:
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("make", "write the configs; further arguments are the job's, for all runs"),
        ("run", "run here what is not finished"),
        ("table", "gather the results into table.csv and losses.png"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folder", type=Path, help="of the sweep")
        if name == "make":
            command.add_argument("base", help="TOML of the job")
            command.add_argument(
                "--vary", action="append", type=parse_vary, required=True, metavar="KEY=V1,V2,..."
            )
        elif name == "run":
            command.add_argument("--jobs", type=positive, default=1, help="runs at a time")
    args, arguments = parser.parse_known_args()
    if arguments and args.command != "make":
        parser.error(f"unknown arguments: {' '.join(arguments)}")
    logging.getLogger().setLevel(logging.CRITICAL)  # torchtitan's: that there is no tokenizer
    try:
        if args.command == "make":
            vary = dict(args.vary)
            if len(vary) < len(args.vary):
                parser.error("--vary: a key is given twice; its values go into one")
            points = make(args.folder, args.base, vary, arguments)
            for number, point in enumerate(points):
                print(f"{args.folder / str(number)}.toml: {point.name}")
            script = os.path.relpath(ROOT / "scripts/slurm/train.sbatch")
            print(
                f"CONFIG_FILE={shlex.quote(str(args.folder))} "
                f"sbatch --array=0-{len(points) - 1} {shlex.quote(script)}"
            )
        elif args.command == "run":
            run(args.folder, args.jobs)
        else:
            table(args.folder)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
