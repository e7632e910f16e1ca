"""The runs of docs/results.md, its tables and its plots: TST against its baseline at small scale.

    python scripts/replicate.py
    python scripts/replicate.py --report

Sweeps over train_configs/replication.toml, each run on one CPU thread; stopped and started again,
it goes on. Their losses come into docs/results/*.csv, and from there into tables and plots.
--report does only the latter.
"""

import argparse
import csv
import logging
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import sweep
from torchtitan.experiments.tst import models  # noqa: F401
from torchtitan.experiments.tst.job_config import (
    CONFIG_FILE,
    SuperpositionConfigManager,
    build_schedule,
    superposition_section,
)
from torchtitan.experiments.tst.planning import paper
from torchtitan.experiments.tst.planning.plan import count, parameters_and_flops
from torchtitan.experiments.tst.results.curves import read_curves

BASE = "train_configs/replication.toml"
SEEDS = {"debug.seed": ["0", "1", "2"]}
BAG_SIZE, STEP_RATIO = sweep.BAG_SIZE, sweep.STEP_RATIO
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
DOCUMENT = sweep.ROOT / "docs" / "results.md"
RUNS_CSV, CURVES_CSV = "runs.csv", "curves.csv"


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        run: sweep and name.
        bag_size: s; 1 without superposition.
        step_ratio: r; 0 without superposition.
        mode: of superposition.
        reinit: whether embedding and LM head were initialised afresh at the boundary.
        steps: of both phases.
        seed: of weights and data.
        parameters: of the model.
        latents: positions that the transformer saw.
        data_tokens: read.
        loss: final next-token validation loss, nats per token.
        hours: of training.
    """

    run: str
    bag_size: int
    step_ratio: float
    mode: str
    reinit: bool
    steps: int
    seed: int
    parameters: int
    latents: int
    data_tokens: int
    loss: float
    hours: float

    @property
    def variant(self) -> str:
        """What it is called in tables and plots."""
        if self.bag_size == 1:
            return "baseline"
        if self.mode != "full":
            return f"bags {'in' if self.mode == 'input' else 'out'} only, s = {self.bag_size}"
        return f"TST, s = {self.bag_size}" + (", re-initialised" if self.reinit else "")


def run(folder: Path, jobs: int) -> None:
    """All runs that are not finished."""
    os.environ |= {"NGPU": "1", "OMP_NUM_THREADS": "1"}
    for name, (vary, arguments) in SWEEPS.items():
        print(f"Sweep {name}", flush=True)
        sweep.make(folder / name, BASE, vary, arguments)
        sweep.run(folder / name, jobs)


def gather(folder: Path, output: Path) -> None:
    """Write what the finished runs came to as CSV: a line for each run, and for each loss."""
    records, curves = [], []
    for name in SWEEPS:
        for result, entry in zip(
            sweep.results(folder / name), sweep.read_sweep(folder / name)["runs"], strict=True
        ):
            of_run = None
            if result.finished:
                of_run = read_curves(entry["folder"], f"{name}/{result.name}")
            if of_run and of_run.validation[-1].at.step == result.steps:
                records.append(_record(of_run.name, Path(entry["folder"]), of_run))
                curves += [
                    {"run": of_run.name, "step": round(point.at.step), "loss": point.loss}
                    for point in of_run.validation
                ]
    output.mkdir(parents=True, exist_ok=True)
    _write_csv(output / RUNS_CSV, map(asdict, records))
    _write_csv(output / CURVES_CSV, curves)


def _record(name: str, folder: Path, curves: Any) -> Record:
    config = SuperpositionConfigManager().parse_args([f"--job.config_file={folder / CONFIG_FILE}"])
    section, schedule = superposition_section(config), build_schedule(config)
    return Record(
        run=name,
        bag_size=schedule.bag_size,
        step_ratio=section.step_ratio or 0,
        mode=schedule.mode,
        reinit=bool(section.reinit_at_recovery),
        steps=config.training.steps,
        seed=config.debug.seed or 0,
        parameters=parameters_and_flops(config, config.training.seq_len)[0],
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


def read_records(path: Path) -> list[Record]:
    """The runs of a CSV file."""
    kinds: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "str": str,
        "bool": lambda text: text == "True",
    }
    types = {f.name: kinds[getattr(f.type, "__name__", str(f.type))] for f in fields(Record)}
    with path.open(newline="") as file:
        return [
            Record(**{key: types[key](value) for key, value in row.items()})
            for row in csv.DictReader(file)
        ]


def read_losses(path: Path) -> dict[str, dict[int, float]]:
    """Validation loss by step, of each run."""
    losses: dict[str, dict[int, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            losses.setdefault(row["run"], {})[int(row["step"])] = float(row["loss"])
    return losses


class Results:
    """The records, as the tables and plots want them."""

    def __init__(self, records: Sequence[Record]):
        self.records = records
        base = [r for r in records if r.run == "bag_size/baseline,seed=0"]
        if not base:
            raise ValueError("the baseline of seed 0 has not been run to its end")
        (self.base,) = base

    def of_seed_0(self) -> list[Record]:
        """Of any number of steps."""
        return [record for record in self.records if record.seed == self.base.seed]

    def variants(self) -> dict[str, list[Record]]:
        """Runs of each variant at r = 0.3, in the order of seeds."""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            if record.steps == self.base.steps and record.step_ratio in (0, 0.3):
                found.setdefault(record.variant, []).append(record)
        return found

    def lead(self, record: Record) -> float:
        """By how much it is below the baseline of its seed and steps, nats."""
        (baseline,) = (
            r
            for r in self.records
            if r.bag_size == 1 and (r.seed, r.steps) == (record.seed, record.steps)
        )
        return baseline.loss - record.loss

    def surface(self) -> paper.Surface:
        """Final loss over r and s, of seed 0."""
        losses = {
            (r.step_ratio, r.bag_size): r.loss
            for r in self.of_seed_0()
            if r.steps == self.base.steps and r.bag_size > 1 and r.mode == "full" and not r.reinit
        }
        base = self.base
        return paper.Surface(
            "demo_small", base.parameters, base.steps, "uniform", base.loss, losses
        )

    def lengths(self) -> list[tuple[Record, Record]]:
        """Baseline and TST with s = 4, r = 0.3 of seed 0, for each number of steps."""
        of: dict[str, dict[int, Record]] = {"baseline": {}, "TST, s = 4": {}}
        for record in self.of_seed_0():
            if record.variant in of and record.step_ratio in (0, 0.3):
                of[record.variant][record.steps] = record
        baselines, runs = of.values()
        return [(baselines[steps], runs[steps]) for steps in sorted(set(baselines) & set(runs))]


def tables(results: Results) -> dict[str, list[list[str]]]:
    """By name; the first row of each is its head."""
    return {
        "variants": _variants_table(results),
        "surface": _surface_table(results.surface()),
        "steps": _steps_table(results),
    }


def _variants_table(results: Results) -> list[list[str]]:
    head = ["run", "data tokens", "mean loss", "standard deviation", "each seed"]
    rows = [[*head, "below the baseline of the same seed by"]]
    for variant, records in results.variants().items():
        losses = [record.loss for record in records]
        leads = [results.lead(record) for record in records]
        rows.append(
            [
                variant,
                count(records[0].data_tokens),
                f"{statistics.mean(losses):.4f}",
                f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "",
                ", ".join(f"{loss:.4f}" for loss in losses),
                ""
                if variant == "baseline"
                else f"{statistics.mean(leads):+.3f} ("
                + ", ".join(f"{lead:+.3f}" for lead in leads)
                + ")",
            ]
        )
    return rows


def _surface_table(surface: paper.Surface) -> list[list[str]]:
    rows = [["*r* \\ *s*", *map(str, surface.bag_sizes)]]
    for r in surface.ratios:
        losses = (surface.losses.get((r, s)) for s in surface.bag_sizes)
        rows.append([f"{r:g}", *("" if loss is None else f"{loss:.4f}" for loss in losses)])
    return rows


def _steps_table(results: Results) -> list[list[str]]:
    rows = [["steps", "latents a parameter", "baseline", "TST, *s* = 4", "below it by"]]
    for baseline, tst in results.lengths():
        rows.append(
            [
                f"{tst.steps:,}",
                f"{tst.latents / tst.parameters:.0f}",
                f"{baseline.loss:.4f}",
                f"{tst.loss:.4f}",
                f"{baseline.loss - tst.loss:+.3f}",
            ]
        )
    return rows


def fill_in(text: str, results: Results) -> str:
    """The document with its tables, each after a line <!-- table: NAME -->, made anew."""
    for name, rows in tables(results).items():
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "| " + " | ".join("---" for _ in rows[0]) + " |")
        marker = f"<!-- table: {name} -->"
        if marker not in text:
            raise ValueError(f"{DOCUMENT}: no line {marker}")
        text = re.sub(
            rf"{re.escape(marker)}\n(\|.*\n)*",
            lambda _, m=marker, ls=lines: "\n".join([m, *ls, ""]),
            text,
        )
    return text


def report(output: Path) -> None:
    """Tables of the document and its plots, from the CSV files."""
    from plot_replication import draw_losses, draw_variants
    from plot_surface import draw_surfaces

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default="outputs/replication",
        help="of the sweeps; default: %(default)s",
    )
    parser.add_argument(
        "--jobs", type=sweep.positive, default=2, help="runs at a time; default: %(default)s"
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.CRITICAL)  # torchtitan's: that there is no tokenizer
    output = DOCUMENT.with_suffix("")
    try:
        if not args.report:
            run(args.folder, args.jobs)
            gather(args.folder, output)
        report(output)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
