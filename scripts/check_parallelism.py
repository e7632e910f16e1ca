"""Train the same job under every layout and in one process, and compare the two.

    python scripts/check_parallelism.py
    python scripts/check_parallelism.py --only "CP 2" --models llama3

Ten steps each, of which the first five are in superposition, in float32 from the same weights. The
table has the largest relative deviations from one process in each phase: of the losses, of the
gradient norms, and of the norms of single parameters' gradients. The same come as JSON into the
folder of the runs. The exit status is 1 where one is above the tolerance.

On a machine without GPUs the processes talk over gloo, and what cannot run there is left out, with
the reason; on one with GPUs each process has its own, and layouts of more are left out.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from command_line import documented_parser
from torchtitan.experiments.tst.data.demo_corpus import make_corpus, read_sources
from torchtitan.experiments.tst.metrics import TRAINING_LOSS, read_metrics
from torchtitan.experiments.tst.results.tables import aligned
from torchtitan.experiments.tst.testing import ranks
from torchtitan.experiments.tst.testing.layouts import (
    GLOBAL_BATCH,
    LAYOUTS,
    MODELS,
    TOLERANCE,
    Layout,
)

STEPS = 10
JOB = (
    "--superposition.bag_size=4",
    "--training.dataset=jsonl",
    "--training.seq_len=32",
    f"--training.local_batch_size={GLOBAL_BATCH}",
    f"--training.global_batch_size={GLOBAL_BATCH}",
    "--training.mixed_precision_param=float32",
    "--activation_checkpoint.mode=none",
    "--lr_scheduler.warmup_steps=2",
    "--optimizer.lr=1e-2",
    # AdamW divides by the size of the gradient, and so blows up the rounding of tiny ones
    "--optimizer.eps=1e-3",
    "--metrics.log_freq=1",
    "--metrics.disable_color_printing",
    "--debug.seed=0",
    "--checkpoint.enable",
    "--checkpoint.interval=1000",
)


@dataclass(frozen=True)
class Deviation:
    """Largest relative deviation from one process in the steps of a phase.

    Attributes:
        loss: of the losses.
        grad_norm: of the norms of the whole gradient.
        parameter: of the norms of a parameter's gradient. That of a few small ones does not show
            in the whole.
    """

    loss: float
    grad_norm: float
    parameter: float

    def __str__(self) -> str:
        return " ".join(f"{value:.0e}" for value in (self.loss, self.grad_norm, self.parameter))

    def within(self, tolerance: float) -> bool:
        """All of them."""
        return max(self.loss, self.grad_norm, self.parameter) <= tolerance


@dataclass(frozen=True)
class Result:
    """Of a layout and a model.

    Attributes:
        superposition: None, as ``recovery``, if the run failed.
        tolerance: of each deviation.
        seconds: that it took.
        error: the end of the log of the process that failed.
    """

    layout: str
    model: str
    processes: int
    superposition: Deviation | None
    recovery: Deviation | None
    tolerance: float
    seconds: float
    error: str = ""

    @property
    def agrees(self) -> bool:
        """With one process, in both phases."""
        phases = (self.superposition, self.recovery)
        return all(phase is not None and phase.within(self.tolerance) for phase in phases)


class Step(NamedTuple):
    """What a step of a run came to; ``parameters`` are the norms of their gradients on ranks."""

    loss: float
    grad_norm: float
    parameters: dict[str, list[float]]


class Runs:
    """Runs of layouts in a folder, each with that of one process to compare with.

    Args:
        folder: of the runs, emptied first.
        steps: of each; the first half is in superposition.

    Attributes:
        job: arguments of all of them.
        boundary: the last superposition step.
    """

    def __init__(self, folder: Path, steps: int = STEPS):
        shutil.rmtree(folder, ignore_errors=True)
        self.folder, self.steps, self.boundary = folder, steps, steps // 2
        corpus = folder / "corpus"
        make_corpus(corpus, list(read_sources())[:60])
        self.job = (
            *JOB,
            f"--training.steps={steps}",
            f"--superposition.steps={self.boundary}",
            f"--model.hf_assets_path={corpus / 'tokenizer'}",
            f"--training.dataset_path={corpus / 'train.jsonl'}",
        )
        self._references: dict[tuple[str, ...], list[Step]] = {}

    def compare(self, layout: Layout, model: str) -> Result:
        """A layout's run with one process's.

        Raises:
            RuntimeError: if that of one process fails.
        """
        begun = time.monotonic()
        of_one = self.of_one_process(*MODELS[model], *layout.job)
        folder = self.folder / re.sub(r"\W+", "-", f"{model} {layout.name}")
        arguments = (*MODELS[model], *layout.arguments)
        of_many, error = self._run(arguments, layout.processes, folder)
        phases = (slice(self.boundary), slice(self.boundary, self.steps))
        deviations = [None if error else _deviation(of_many[p], of_one[p]) for p in phases]
        seconds = time.monotonic() - begun
        return Result(
            layout.name, model, layout.processes, *deviations, layout.tolerance, seconds, error
        )

    def of_one_process(self, *arguments: str) -> list[Step]:
        """The steps of one process's run, of the job with these arguments.

        Raises:
            RuntimeError: if it fails.
        """
        if arguments not in self._references:
            folder = self.folder / f"one-process-{len(self._references)}"
            of_one, error = self._run(arguments, 1, folder)
            if error:
                raise RuntimeError(f"One process with {' '.join(arguments)} failed:\n{error}")
            self._references[arguments] = of_one
        return self._references[arguments]

    def seed(self, arguments: Sequence[str]) -> Path:
        """Folder with the checkpoint that runs of these arguments' model begin from."""
        of_model = [argument for argument in arguments if argument.startswith("--model.")]
        folder = self.folder / re.sub(r"\W+", "-", f"seed {' '.join(of_model)}")
        if not folder.exists():
            seed_only = "--checkpoint.create_seed_checkpoint"
            if error := ranks.run([*self.job, *of_model, seed_only], 1, folder):
                raise RuntimeError(f"No seed checkpoint of {' '.join(of_model)}:\n{error}")
        return folder / "checkpoint"

    def train(self, arguments: Sequence[str], processes: int, folder: Path) -> str | None:
        """Train the job with these arguments from the seed; :func:`ranks.run`."""
        shutil.copytree(self.seed(arguments), folder / "checkpoint")
        whole_job = [*self.job, *arguments, "--checkpoint.load_step=0"]
        return ranks.run(whole_job, processes, folder)

    def _run(
        self, arguments: tuple[str, ...], processes: int, folder: Path
    ) -> tuple[list[Step], str]:
        """The steps, and why there are none."""
        if error := self.train(arguments, processes, folder):
            return [], error
        lines, gradients = read_metrics(folder), ranks.gradient_norms(folder)
        assert [line["step"] for line in lines] == list(range(1, self.steps + 1))
        return [
            Step(line[TRAINING_LOSS], line["grad_norm"], norms)
            for line, norms in zip(lines, gradients, strict=True)
        ], ""


def _deviation(steps: list[Step], of_one: list[Step]) -> Deviation:
    pairs = list(zip(steps, of_one, strict=True))
    assert pairs and all(a.parameters.keys() == b.parameters.keys() for a, b in pairs)
    return Deviation(
        max(_relative(a.loss, b.loss) for a, b in pairs),
        max(_relative(a.grad_norm, b.grad_norm) for a, b in pairs),
        max(
            _relative(norm, b.parameters[name][0])
            for a, b in pairs
            for name, norms in a.parameters.items()
            for norm in norms
        ),
    )


def _relative(value: float, reference: float) -> float:
    if value == reference:
        return 0.0
    deviation = abs(value - reference) / abs(reference) if reference else math.inf
    return math.inf if math.isnan(deviation) else deviation


def obstacle(layout: Layout, gpus: int) -> str:
    """Why a layout cannot run on a machine with so many GPUs; empty if it can."""
    if gpus == 0:
        return layout.gpu
    if layout.processes > gpus:
        return f"{layout.processes} GPUs"
    if "CP" in layout.degrees and "flex" not in layout.note:
        return "TorchTitan's attention kernels of GPUs under context parallelism are not of float32"
    return ""


def table(results: Sequence[Result]) -> list[str]:
    """A line for each layout; for each model and phase, its deviations."""
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
    parser.add_argument("--only", default="", metavar="REGEX", help="layouts with such a name")
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
    left_out = {layout.name: why for layout, _ in chosen if (why := obstacle(layout, gpus))}
    if left_out:
        print("\nNot on this machine:", *(f"{n}: {why}" for n, why in left_out.items()), sep="\n")
    agree = sum(result.agrees for result in results)
    seconds = time.monotonic() - begun
    print(f"\n{agree} of {len(results)} agree within {TOLERANCE:.0e}; {seconds / 60:.1f} minutes")
    if agree < len(results):
        sys.exit(1)


if __name__ == "__main__":
    main()
