"""The runs of docs/results.md, its tables and its plots: TST against its baseline at small scale.

    python scripts/replicate.py
    python scripts/replicate.py --only stages recipe
    python scripts/replicate.py --report
    python scripts/replicate.py --only gpu

Each run has one process, with one CPU thread. A run that the CSV files have already is not made
again; docs/results has all runs of the page, so give another --output to make them yourself.
Stopped and started again, the command continues. Each sweep's losses go into the CSV files when
its runs have ended, and from there into tables and plots.

Arguments of a job, such as --training.steps=1000, change all runs; they need a --folder and an
--output of their own.
"""

import argparse
import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import documented_parser
from replication.records import (
    CURVES_CSV,
    OUTPUT,
    RUNS_CSV,
    Recipe,
    Record,
    check_corpora,
    read_losses,
    read_records,
    stages_of,
    write,
)
from replication.sweeps import BASE, CORPORA, SWEEPS, Sweep
from torchtitan.experiments.tst import models
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.config.sections import JobConfig, superposition_section
from torchtitan.experiments.tst.errors import ArgumentError
from torchtitan.experiments.tst.planning.plan import parameters_of
from torchtitan.experiments.tst.planning.sweep import make, read_sweep
from torchtitan.experiments.tst.resilience.reporting import errors_in_one_line
from torchtitan.experiments.tst.resilience.run_folder import CONFIG_FILE
from torchtitan.experiments.tst.results.curves import Curves, read_curves
from torchtitan.experiments.tst.results.sweep import results, run_unfinished

ON_CPU = [sweep.name for sweep in SWEEPS if sweep.base == BASE]
_FOLDER = Path("outputs/replication")
_FOR_PAGES = ("jinja2", "matplotlib", "scipy")


@dataclass(frozen=True)
class Part:
    """A sweep on one of its corpora.

    Attributes:
        name: its folder below that of all sweeps.
        corpus: name of the corpus.
        recorded: names of the runs whose results are in the CSV files.
        missing: how many runs are neither recorded nor finished.
    """

    name: str
    corpus: str
    recorded: frozenset[str]
    missing: int


def run(
    sweeps: list[Sweep], folder: Path, output: Path, jobs: int, job_arguments: Sequence[str] = ()
) -> None:
    """Make all runs that are not in the CSV files yet.

    Args:
        sweeps: what to run.
        folder: where all sweeps have their folders.
        output: folder of the CSV files.
        jobs: runs at a time.
        job_arguments: arguments of the job, for all runs.

    Raises:
        ArgumentError: before the first run, for runs that cannot be made or compared.
    """
    recorded = read_records(output / RUNS_CSV)
    parts = [
        prepare(sweep, corpus, folder, recorded, job_arguments)
        for sweep in sweeps
        for corpus in sweep.corpora
    ]
    read = {part.corpus for part in parts if part.missing}
    for corpus in (CORPORA[name] for name in sorted(read)):
        if corpus.made_by and not Path(corpus.folder).exists():
            raise ArgumentError(f"{corpus.folder} is missing; make it with `{corpus.made_by}`")
    known = [(record.corpus, record.corpus_id) for record in recorded]
    check_corpora([*known, *((name, CORPORA[name].id) for name in sorted(read))], output)
    os.environ["OMP_NUM_THREADS"] = "1"
    say = functools.partial(print, flush=True)
    for part in parts:
        say(f"Sweep {part.name}")
        run_unfinished(folder / part.name, jobs, 1, say, skip=part.recorded)
        gather(part.name, part.corpus, folder, output)


def prepare(
    sweep: Sweep,
    corpus: str,
    folder: Path,
    recorded: Sequence[Record],
    job_arguments: Sequence[str] = (),
) -> Part:
    """Write the configs of a sweep, and find out which of its runs are missing.

    Args:
        sweep: the sweep.
        corpus: name of one of its corpora.
        folder: where all sweeps have their folders.
        recorded: runs that have been made; another sweep's count, too.
        job_arguments: arguments of the job, for all runs.

    Raises:
        ArgumentError: for arguments with which no run has a final validation loss.
    """
    name = sweep.folder(corpus)
    for argument in job_arguments:
        if (key := argument.removeprefix("--").partition("=")[0]) in sweep.vary:
            raise ArgumentError(f"{argument}: the sweep {sweep.name} varies {key}")
    arguments = [*sweep.arguments, *CORPORA[corpus].arguments, *job_arguments]
    points = make(folder / name, sweep.base, sweep.vary, arguments)
    for point in points:
        if point.last_validated < point.steps:
            raise ArgumentError(
                f"{name}: the last validation is after step {point.last_validated} of "
                f"{point.steps}, and a run is judged after its last step; set --validation.enable "
                "and a --validation.freq that divides --training.steps"
            )
    made = {(record.recipe, record.seed) for record in recorded}
    configs = [read_config(folder / name / f"{number}.toml") for number in range(len(points))]
    done = {
        point.name
        for point, config in zip(points, configs, strict=True)
        if (recipe_of(config, corpus), config.debug.seed or 0) in made
    }
    finished = {result.name for result in results(folder / name) if result.finished}
    return Part(name, corpus, frozenset(done), len(points) - len(done | finished))


def gather(name: str, corpus: str, folder: Path, output: Path) -> None:
    """Write the results of a sweep's finished runs into the CSV files, which keep all other runs.

    Args:
        name: its folder below that of all sweeps.
        corpus: name of its corpus.
        folder: where all sweeps have their folders.
        output: folder of the CSV files.
    """
    records = {record.run: record for record in read_records(output / RUNS_CSV)}
    losses = read_losses(output / CURVES_CSV)
    entries = read_sweep(folder / name)["runs"]
    for result, entry in zip(results(folder / name), entries, strict=True):
        if result.finished:
            curves = read_curves(entry["folder"], f"{name}/{result.name}")
            records[curves.name] = _record(curves, corpus)
            losses[curves.name] = {round(point.at.step): point.loss for point in curves.validation}
        elif result.step == result.steps:
            print(
                f"{name}/{result.name} is skipped: it stopped before its last validation. "
                f"Delete {entry['folder']} to run it again"
            )
    check_corpora([(record.corpus, record.corpus_id) for record in records.values()], output)
    write(output, records.values(), losses)


def read_config(path: Path) -> JobConfig:
    """Read the config of a run."""
    return SuperpositionConfigManager().parse_args([f"--job.config_file={path}"])


def recipe_of(config: JobConfig, corpus: str) -> Recipe:
    """Return what a job trains, but for its seed."""
    section = superposition_section(config)
    return Recipe(
        corpus=corpus,
        model=config.model.flavor,
        lr=config.optimizer.lr,
        stages=stages_of(build_schedule(config)),
        mode=section.mode,
        weighting=section.weighting,
        reinit=bool(section.reinit_at_recovery),
        steps=config.training.steps,
    )


def _record(curves: Curves, corpus: str) -> Record:
    config = read_config(curves.folder / CONFIG_FILE)
    last = curves.validation[-1]
    return Record(
        **vars(recipe_of(config, corpus)),
        run=curves.name,
        seed=config.debug.seed or 0,
        parameters=parameters_of(config),
        latents=round(last.at.latents),
        data_tokens=round(last.at.data_tokens),
        loss=last.loss,
        hours=last.at.hours,
        corpus_id=CORPORA[corpus].id,
    )


def positive(text: str) -> int:
    """A number of runs on the command line."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[sweep.name for sweep in SWEEPS],
        metavar="SWEEP",
        help="sweeps to run (%(choices)s); default: all but gpu",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=_FOLDER,
        help="where the runs go, a folder for each sweep; default: %(default)s",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help="where the CSV files and plots go; default: docs/results, and the pages in docs, too",
    )
    parser.add_argument(
        "--jobs", type=positive, default=2, help="runs at a time; default: %(default)s"
    )
    parser.add_argument(
        "--report", action="store_true", help="train nothing; read what the runs have left"
    )
    args, job_arguments = parser.parse_known_args()
    logging.getLogger().setLevel(logging.CRITICAL)  # torchtitan's: that there is no tokenizer
    models.register()
    with errors_in_one_line():
        _run_or_report(args, job_arguments)


def _run_or_report(args: argparse.Namespace, job_arguments: Sequence[str]) -> None:
    if job_arguments and args.report:
        raise ArgumentError(f"{' '.join(job_arguments)}: --report trains nothing")
    shared = args.folder.resolve() == _FOLDER.resolve() or args.output.resolve() == OUTPUT
    if job_arguments and shared:
        raise ArgumentError(
            f"{' '.join(job_arguments)}: runs that differ from those of docs/results.md; give a "
            "--folder and an --output of their own"
        )
    missing = [name for name in _FOR_PAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Skips tables and plots: {', '.join(missing)} missing; pip install -e '.[dev]'")
    sweeps = [sweep for sweep in SWEEPS if sweep.name in (args.only or ON_CPU)]
    if args.report:
        for sweep in sweeps:
            for corpus in sweep.corpora:
                if (args.folder / sweep.folder(corpus)).exists():
                    gather(sweep.folder(corpus), corpus, args.folder, args.output)
    else:  # gathers after each sweep
        run(sweeps, args.folder, args.output, args.jobs, job_arguments)
    if not missing:
        from replication import pages

        pages.write(args.output)


if __name__ == "__main__":
    main()
