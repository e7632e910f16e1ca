"""Make the runs, tables and plots of docs/results.md: TST against its baseline at small scale.

    python scripts/replicate.py
    python scripts/replicate.py --only stages recipe
    python scripts/replicate.py --report
    python scripts/replicate.py --only gpu

Each run has one process with one CPU thread. Runs that are in the CSV files are not made again.
docs/results has all runs of the page, so give another --output to make them yourself. If you stop
the command and start it again, it continues. When the runs of a sweep have ended, their losses are
added to the CSV files, and then to tables and plots.

Arguments of a job, such as --training.steps=1000, change all runs. With such arguments, give
another --folder and another --output.
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
from torchtitan.experiments.tst.config.job_config import JobConfig, superposition_section
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.data.demo_corpus import make_if_read
from torchtitan.experiments.tst.errors import ArgumentError
from torchtitan.experiments.tst.planning.plan import parameters_of
from torchtitan.experiments.tst.planning.sweep import Point, make, read_sweep
from torchtitan.experiments.tst.resilience.reporting import errors_in_one_line
from torchtitan.experiments.tst.resilience.run_folder import CONFIG_FILE
from torchtitan.experiments.tst.results.curves import Curves, read_curves
from torchtitan.experiments.tst.results.sweep import results, run_unfinished

ON_CPU = [sweep.name for sweep in SWEEPS if sweep.base == BASE]
_FOLDER = Path("outputs/replication")
CORPUS_ID = "corpus_id"
_FOR_PAGES = ("jinja2", "matplotlib", "scipy")


@dataclass(frozen=True)
class Part:
    """A sweep on one of its corpora.

    Attributes:
        name: its folder below the folder of all sweeps.
        corpus: name of the corpus.
        points: its runs.
    """

    name: str
    corpus: str
    points: list[Point]

    def recorded(self, output: Path) -> set[str]:
        """Return the names of its runs whose recipe and seed the CSV files already have."""
        known = {(record.recipe, record.seed) for record in read_records(output / RUNS_CSV)}
        return {
            point.name
            for point in self.points
            if (recipe_of(point.config, self.corpus), point.config.debug.seed or 0) in known
        }


def run(
    sweeps: list[Sweep], folder: Path, output: Path, jobs: int, job_arguments: Sequence[str] = ()
) -> None:
    """Make all runs that are not in the CSV files yet.

    Args:
        sweeps: sweeps to run.
        folder: parent of the folders of all sweeps.
        output: folder of the CSV files.
        jobs: runs at a time.
        job_arguments: arguments of the job, for all runs.

    Raises:
        ArgumentError: before the first run starts, for runs that cannot be made or compared.
    """
    say = functools.partial(print, flush=True)
    say(f"Preparing {len(sweeps)} sweeps")
    parts = [
        prepare(sweep, corpus, folder, job_arguments)
        for sweep in sweeps
        for corpus in sweep.corpora
    ]
    find_corpora([part for part in parts if missing(part, folder, output)], folder, output)
    os.environ["OMP_NUM_THREADS"] = "1"
    for part in parts:
        say(f"Sweep {part.name}")
        run_unfinished(folder / part.name, jobs, 1, say, skip=part.recorded(output))
        gather(part.name, part.corpus, folder, output)


def prepare(sweep: Sweep, corpus: str, folder: Path, job_arguments: Sequence[str] = ()) -> Part:
    """Write the configs of a sweep.

    Args:
        sweep: the sweep.
        corpus: name of one of its corpora.
        folder: parent of the folders of all sweeps.
        job_arguments: arguments of the job, for all runs.

    Raises:
        ArgumentError: for an argument that the sweep varies, or runs without a final validation.
    """
    name = sweep.folder(corpus)
    for argument in job_arguments:
        if (key := argument.removeprefix("--").partition("=")[0]) in sweep.vary:
            raise ArgumentError(
                f"{argument}: the sweep {sweep.name} varies {key}. Remove the argument"
            )
    arguments = [*sweep.arguments, *CORPORA[corpus].arguments, *job_arguments]
    points = make(folder / name, sweep.base, sweep.vary, arguments)
    for point in points:
        if point.last_validated < point.steps:
            raise ArgumentError(
                f"{name}: the last validation is after step {point.last_validated} of "
                f"{point.steps}, but it must be after the last step. Set --validation.enable and a "
                "--validation.freq that divides --training.steps"
            )
    return Part(name, corpus, points)


def missing(part: Part, folder: Path, output: Path) -> bool:
    """Return whether a run is neither finished nor in the CSV files."""
    done = part.recorded(output)
    return any(not (run.finished or run.name in done) for run in results(folder / part.name))


def find_corpora(parts: list[Part], folder: Path, output: Path) -> None:
    """Check that the corpora exist and are those of earlier runs; make the demo's corpus.

    Args:
        parts: parts to run.
        folder: parent of the folders of all sweeps; the ID of a sweep's corpus is written to its
            folder.
        output: folder of the CSV files.

    Raises:
        ArgumentError: for a corpus that is missing, or that differs from that of earlier runs.
    """
    for part in parts:
        corpus = CORPORA[part.corpus]
        if not corpus.made_by:
            make_if_read(part.points[0].config)
        elif not corpus.id:
            raise ArgumentError(f"{corpus.folder} is missing. Make it with `{corpus.made_by}`")
    known = [(record.corpus, record.corpus_id) for record in read_records(output / RUNS_CSV)]
    began = [(part.corpus, _corpus_id(part.name, part.corpus, folder)) for part in parts]
    here = [(part.corpus, CORPORA[part.corpus].id) for part in parts]
    check_corpora([*known, *began, *here], output)
    for part in parts:
        (folder / part.name / CORPUS_ID).write_text(CORPORA[part.corpus].id)


def _corpus_id(name: str, corpus: str, folder: Path) -> str:
    """Return the ID of the corpus that the runs of a sweep read."""
    path = folder / name / CORPUS_ID
    return path.read_text() if path.exists() else CORPORA[corpus].id


def gather(name: str, corpus: str, folder: Path, output: Path) -> None:
    """Write the results of a sweep's finished runs to the CSV files; all other runs stay there.

    Args:
        name: the sweep's folder below the folder of all sweeps.
        corpus: name of its corpus.
        folder: parent of the folders of all sweeps.
        output: folder of the CSV files.
    """
    records = {record.run: record for record in read_records(output / RUNS_CSV)}
    losses = read_losses(output / CURVES_CSV)
    corpus_id = _corpus_id(name, corpus, folder)
    entries = read_sweep(folder / name)["runs"]
    for result, entry in zip(results(folder / name), entries, strict=True):
        if result.finished:
            curves = read_curves(entry["folder"], f"{name}/{result.name}")
            records[curves.name] = _record(curves, corpus, corpus_id)
            losses[curves.name] = {round(point.at.step): point.loss for point in curves.validation}
        elif result.step == result.steps:
            print(
                f"{name}/{result.name} is skipped: it stopped before its last validation. To run "
                f"it again, delete {entry['folder']}"
            )
    check_corpora([(record.corpus, record.corpus_id) for record in records.values()], output)
    write(output, records.values(), losses)


def recipe_of(config: JobConfig, corpus: str) -> Recipe:
    """Return the recipe of a config."""
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


def _record(curves: Curves, corpus: str, corpus_id: str) -> Record:
    job = f"--job.config_file={curves.folder / CONFIG_FILE}"
    config = SuperpositionConfigManager().parse_args([job])
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
        corpus_id=corpus_id,
    )


def positive(text: str) -> int:
    """Return a number from the command line.

    Raises:
        ValueError: if it is less than 1.
    """
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
        help="sweeps to run (%(choices)s); default: all except gpu",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=_FOLDER,
        help="folder of the runs, with a folder for each sweep; default: %(default)s",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help="folder of CSV files and plots; default: docs/results, and then the pages in docs are "
        "written, too",
    )
    parser.add_argument(
        "--jobs", type=positive, default=2, help="runs at a time; default: %(default)s"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing; only collect the results of finished runs",
    )
    args, job_arguments = parser.parse_known_args()
    logging.getLogger().setLevel(logging.CRITICAL)  # torchtitan logs that there is no tokenizer
    models.register()
    with errors_in_one_line():
        _run_or_report(args, job_arguments)


def _run_or_report(args: argparse.Namespace, job_arguments: Sequence[str]) -> None:
    """Run or report what the command line asks for.

    Raises:
        ArgumentError: for arguments of a job with --report or the default folders.
    """
    if job_arguments and args.report:
        raise ArgumentError(
            f"{' '.join(job_arguments)}: --report trains nothing. Remove the arguments of the job"
        )
    shared = args.folder.resolve() == _FOLDER.resolve() or args.output.resolve() == OUTPUT
    if job_arguments and shared:
        raise ArgumentError(
            f"{' '.join(job_arguments)}: the runs would differ from those of docs/results.md. Give "
            "another --folder and another --output"
        )
    absent = [name for name in _FOR_PAGES if importlib.util.find_spec(name) is None]
    if absent:
        print(
            f"Tables and plots are skipped: {', '.join(absent)} missing. To get them, run "
            "pip install -e '.[dev]'"
        )
    sweeps = [sweep for sweep in SWEEPS if sweep.name in (args.only or ON_CPU)]
    if args.report:
        for sweep in sweeps:
            for corpus in sweep.corpora:
                if (args.folder / sweep.folder(corpus)).exists():
                    gather(sweep.folder(corpus), corpus, args.folder, args.output)
    else:  # collects the results after each sweep
        run(sweeps, args.folder, args.output, args.jobs, job_arguments)
    if not absent:
        from replication import pages

        pages.write(args.output)


if __name__ == "__main__":
    main()
