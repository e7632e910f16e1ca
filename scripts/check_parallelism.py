"""Train the same job under every layout and in one process, and compare the results.

    python scripts/check_parallelism.py
    python scripts/check_parallelism.py --only "CP 2" --models llama3

Each run has ten steps, the first five in superposition, in float32 from the same weights. The table
has the largest relative deviations from one process in each phase: of the losses, of the gradient
norms, and of the norms of single parameters' gradients. They are also written as JSON to the folder
of the runs. The exit code is 1 if a deviation is above the tolerance.

On a machine without GPUs, the processes communicate over gloo, and layouts that need a GPU are
skipped with the reason. On a machine with GPUs, each process has its own, and layouts with more
processes are skipped.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from command_line import documented_parser
from torchtitan.experiments.tst.results.tables import aligned
from torchtitan.experiments.tst.testing.layouts import LAYOUTS, MODELS, TOLERANCE, Layout
from torchtitan.experiments.tst.testing.runs import Result, Runs


def obstacle(layout: Layout, gpus: int) -> str:
    """Return why a layout cannot run on a machine with ``gpus`` GPUs; "" if it can."""
    if gpus == 0:
        return layout.gpu
    if layout.processes > gpus:
        return f"needs {layout.processes} GPUs"
    if "CP" in layout.degrees and "flex" not in layout.note:
        return "on GPUs, TorchTitan's attention under context parallelism does not support float32"
    return ""


def table(results: Sequence[Result]) -> list[str]:
    """Return the table of deviations: a line for each layout, a column for each model and phase."""
    models = [model for model in MODELS if any(r.model == model for r in results)]
    cells = {(r.layout, r.model): r for r in results}
    rows = [
        ["", "", *(name for model in models for name in (model, ""))],
        ["layout", "processes", *(["superposition", "recovery"] * len(models))],
    ]
    for layout in dict.fromkeys(r.layout for r in results):
        processes = next(r.processes for r in results if r.layout == layout)
        row = [layout, str(processes)]
        for model in models:
            result = cells.get((layout, model))
            row += _cells(result) if result else ["", ""]
        rows.append(row)
    return aligned(rows)


def _cells(result: Result) -> list[str]:
    if result.error:
        return ["failed", ""]
    phases = (result.superposition, result.recovery)
    return [
        f"{phase}{'' if phase.within(result.tolerance) else ' !'}"
        for phase in phases
        if phase is not None
    ]


def _chosen(options: argparse.Namespace) -> Iterator[tuple[Layout, str]]:
    for layout in LAYOUTS:
        for model in layout.models:
            if model in options.models and re.search(options.only, layout.name):
                yield layout, model


def main() -> None:
    parser = documented_parser(__doc__ or "")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="layouts whose name matches; default: all"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/parallelism"), help="folder of the runs"
    )
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    chosen = list(_chosen(options))
    if not chosen:
        parser.error(f"no layout of {', '.join(options.models)} matches {options.only!r}")
    runs, begun, results = Runs(options.output), time.monotonic(), []
    cells = [(layout, model) for layout, model in chosen if not obstacle(layout, gpus)]
    for number, (layout, model) in enumerate(cells, 1):
        result = runs.compare(layout, model)
        results.append(result)
        left = (time.monotonic() - begun) / number * (len(cells) - number)
        print(
            f"{number}/{len(cells)}  {model}, {layout.name}: {' | '.join(_cells(result))}  "
            f"({result.seconds:.1f} s, {left / 60:.0f} min left)",
            flush=True,
        )
        if result.error:
            print(result.error, file=sys.stderr, flush=True)
    report = [asdict(result) for result in results]
    (options.output / "parallelism.json").write_text(json.dumps(report, indent=1))
    print("\nLargest relative deviations from one process: loss, gradient norm, one parameter's\n")
    print(*table(results), sep="\n")
    skipped = {layout.name: why for layout, _ in chosen if (why := obstacle(layout, gpus))}
    if skipped:
        reasons = (f"{name}: {why}" for name, why in skipped.items())
        print("\nSkipped on this machine:", *reasons, sep="\n")
    agree = sum(result.agrees for result in results)
    seconds = time.monotonic() - begun
    print(f"\n{agree} of {len(results)} agree within {TOLERANCE:.0e}; {seconds / 60:.1f} minutes")
    if agree < len(results):
        sys.exit(1)


if __name__ == "__main__":
    main()
