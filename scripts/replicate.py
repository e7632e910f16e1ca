"""The runs of docs/results.md, its tables and its plots: TST against its baseline at small scale.

    python scripts/replicate.py
    python scripts/replicate.py --report

Sweeps over train_configs/replication.toml, each run on one CPU thread; stopped and started again,
it goes on. Their losses come into docs/results/*.csv, and from there into tables and plots.
--report does only the latter.
"""

import csv
import functools
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from command_line import documented_parser
from replication_results import (
    CURVES_CSV,
    RUNS_CSV,
    Record,
    Results,
    fill_in,
    read_losses,
    read_records,
)
from torchtitan.experiments.tst import models, paper
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.config.sections import superposition_section
from torchtitan.experiments.tst.errors import ArgumentError
from torchtitan.experiments.tst.planning.plan import parameters_of
from torchtitan.experiments.tst.planning.sweep import BAG_SIZE, STEP_RATIO, make, read_sweep
from torchtitan.experiments.tst.resilience.reporting import errors_in_one_line
from torchtitan.experiments.tst.resilience.run_folder import CONFIG_FILE
from torchtitan.experiments.tst.results.curves import Curves, read_curves
from torchtitan.experiments.tst.results.sweep import results, run_unfinished

BASE = "train_configs/replication.toml"
SEEDS = {"debug.seed": ["0", "1", "2"]}
# name of each sweep: what is varied, further arguments
SWEEPS: dict[str, tuple[dict[str, list[str]], list[str]]] = {
    "bag_size": ({BAG_SIZE: ["1", "2", "4", "8", "16"], **SEEDS}, []),
    "mode": ({"superposition.mode": ["input", "output"], **SEEDS}, []),
    "reinit": (SEEDS, ["--superposition.reinit_at_recovery=tok_embeddings,output"]),
    "steps": ({"training.steps": ["1200", "4800"], BAG_SIZE: ["1", "4"]}, []),
    "step_ratio": (
        {BAG_SIZE: ["2", "4", "8", "16"], STEP_RATIO: ["0.1", "0.2", "0.4", "0.6"]},
        [],
    ),
}
DOCUMENT = Path(__file__).parent.parent / "docs" / "results.md"


def run(folder: Path, jobs: int) -> None:
    """All runs that are not finished."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, (vary, arguments) in SWEEPS.items():
        print(f"Sweep {name}", flush=True)
        make(folder / name, BASE, vary, arguments)
        run_unfinished(folder / name, jobs, 1, functools.partial(print, flush=True))


def gather(folder: Path, output: Path) -> None:
    """Write what the finished runs came to as CSV: a line for each run, and for each loss."""
    records, curves = [], []
    for name in SWEEPS:
        for result, entry in zip(
            results(folder / name), read_sweep(folder / name)["runs"], strict=True
        ):
            if not result.finished:
                continue
            of_run = read_curves(entry["folder"], f"{name}/{result.name}")
            if of_run.validation[-1].at.step == result.steps:
                records.append(_record(of_run))
                curves += [
                    {"run": of_run.name, "step": round(point.at.step), "loss": point.loss}
                    for point in of_run.validation
                ]
    output.mkdir(parents=True, exist_ok=True)
    _write_csv(output / RUNS_CSV, map(asdict, records))
    _write_csv(output / CURVES_CSV, curves)


def _record(curves: Curves) -> Record:
    job = f"--job.config_file={curves.folder / CONFIG_FILE}"
    config = SuperpositionConfigManager().parse_args([job])
    section = superposition_section(config)
    bag_size, *others = [stage.bag_size for stage in build_schedule(config).stages] or [1]
    if others:
        raise ArgumentError(f"{curves.name} has stages, which have no column in {RUNS_CSV}")
    return Record(
        run=curves.name,
        bag_size=bag_size,
        step_ratio=section.step_ratio or 0,
        mode=section.mode,
        reinit=bool(section.reinit_at_recovery),
        steps=config.training.steps,
        seed=config.debug.seed or 0,
        parameters=parameters_of(config),
        latents=round(curves.end.latents),
        data_tokens=round(curves.end.data_tokens),
        loss=curves.validation[-1].loss,
        hours=curves.end.hours,
    )


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report(output: Path) -> None:
    """Tables of the document and its plots, from the CSV files."""
    from plot_replication import draw_losses, draw_variants
    from torchtitan.experiments.tst.planning.surface_plots import draw_surfaces

    results = Results(read_records(output / RUNS_CSV))
    draw_losses(results, read_losses(output / CURVES_CSV), output / "losses.png")
    draw_variants(results, output / "variants.png")
    own = results.surface()
    of_paper = paper.nearest_surface(own.parameters, own.steps, own.weighting)
    draw_surfaces(
        {f"validation loss: {own.title}": own, f"paper: {of_paper.title}": of_paper},
        output / "surface.png",
    )
    DOCUMENT.write_text(fill_in(DOCUMENT.read_text(), results))
    print(f"{len(results.records)} runs: {DOCUMENT}, {output}")


def positive(text: str) -> int:
    """A number of runs on the command line."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        default="outputs/replication",
        help="of the sweeps; default: %(default)s",
    )
    parser.add_argument(
        "--jobs", type=positive, default=2, help="runs at a time; default: %(default)s"
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.CRITICAL)  # torchtitan's: that there is no tokenizer
    output = DOCUMENT.with_suffix("")
    models.register()
    with errors_in_one_line():
        if not args.report:
            run(args.folder, args.jobs)
            gather(args.folder, output)
        report(output)


if __name__ == "__main__":
    main()
