"""The runs of docs/results.md, its tables and its plots: TST against its baseline at small scale.

    python scripts/replicate.py
    python scripts/replicate.py --only stages recipe
    python scripts/replicate.py --report
    python scripts/replicate.py --only gpu

Each run has one process, with one CPU thread. Runs that the CSV files in docs/results hold are not
made again; with another --output, all are. Stopped and started again, it continues. The losses go
into the CSV files, and from there into tables and plots. --report runs nothing. Arguments of a job,
such as --training.steps=100, change all runs; give another --folder and --output with them.
"""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from command_line import documented_parser
from replication import pages
from replication.records import (
    CURVES_CSV,
    RUNS_CSV,
    Record,
    read_losses,
    read_records,
    stages_of,
    write,
)
from replication.sweeps import BASE, CORPORA, SWEEPS, Sweep
from torchtitan.experiments.tst import models
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.config.sections import superposition_section
from torchtitan.experiments.tst.planning.plan import parameters_of
from torchtitan.experiments.tst.planning.sweep import make, read_sweep
from torchtitan.experiments.tst.resilience.reporting import errors_in_one_line
from torchtitan.experiments.tst.resilience.run_folder import CONFIG_FILE
from torchtitan.experiments.tst.results.curves import Curves, read_curves
from torchtitan.experiments.tst.results.sweep import results, run_unfinished

ON_CPU = [sweep.name for sweep in SWEEPS if sweep.base == BASE]


def run(
    sweeps: list[Sweep], folder: Path, output: Path, jobs: int, job_arguments: Sequence[str] = ()
) -> None:
    """Make all runs that are not in the CSV files yet."""
    os.environ["OMP_NUM_THREADS"] = "1"
    recorded = {record.run for record in read_records(output / RUNS_CSV)}
    say = functools.partial(print, flush=True)
    for sweep in sweeps:
        for corpus in sweep.corpora:
            name = sweep.folder(corpus)
            say(f"Sweep {name}")
            arguments = [*sweep.arguments, *CORPORA[corpus].arguments(), *job_arguments]
            make(folder / name, sweep.base, sweep.vary, arguments)
            done = {run.removeprefix(f"{name}/") for run in recorded}
            run_unfinished(folder / name, jobs, 1, say, skip=done)
            gather([sweep], folder, output)


def gather(sweeps: list[Sweep], folder: Path, output: Path) -> None:
    """Write the results of finished runs into the CSV files, which keep all other runs."""
    records = {record.run: record for record in read_records(output / RUNS_CSV)}
    losses = read_losses(output / CURVES_CSV)
    names = [(sweep.folder(corpus), corpus) for sweep in sweeps for corpus in sweep.corpora]
    for name, corpus in names:
        if not (folder / name).exists():
            continue
        for result, entry in zip(
            results(folder / name), read_sweep(folder / name)["runs"], strict=True
        ):
            if not result.finished:
                continue
            curves = read_curves(entry["folder"], f"{name}/{result.name}")
            if curves.validation[-1].at.step == result.steps:
                records[curves.name] = _record(curves, corpus)
                losses[curves.name] = {
                    round(point.at.step): point.loss for point in curves.validation
                }
    write(output, records.values(), losses)


def _record(curves: Curves, corpus: str) -> Record:
    job = f"--job.config_file={curves.folder / CONFIG_FILE}"
    config = SuperpositionConfigManager().parse_args([job])
    section = superposition_section(config)
    return Record(
        run=curves.name,
        corpus=corpus,
        model=config.model.flavor,
        lr=config.optimizer.lr,
        stages=stages_of(build_schedule(config)),
        mode=section.mode,
        weighting=section.weighting,
        reinit=bool(section.reinit_at_recovery),
        steps=config.training.steps,
        seed=config.debug.seed or 0,
        parameters=parameters_of(config),
        latents=round(curves.end.latents),
        data_tokens=round(curves.end.data_tokens),
        loss=curves.validation[-1].loss,
        hours=curves.end.hours,
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
        help="sweeps to run; default: all but those for a GPU",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default="outputs/replication",
        help="of the sweeps; default: %(default)s",
    )
    parser.add_argument(
        "--output", type=Path, default=pages.OUTPUT, help="of the CSV files and plots"
    )
    parser.add_argument(
        "--jobs", type=positive, default=2, help="runs at a time; default: %(default)s"
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    args, job_arguments = parser.parse_known_args()
    logging.getLogger().setLevel(logging.CRITICAL)  # torchtitan's: that there is no tokenizer
    models.register()
    sweeps = [sweep for sweep in SWEEPS if sweep.name in (args.only or ON_CPU)]
    with errors_in_one_line():
        if args.report:
            gather(sweeps, args.folder, args.output)
        else:  # gathers after each sweep
            run(sweeps, args.folder, args.output, args.jobs, job_arguments)
        pages.write(args.output)


if __name__ == "__main__":
    main()
