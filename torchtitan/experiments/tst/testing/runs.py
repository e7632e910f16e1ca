"""Compare runs under a layout with runs in one process, from the same weights."""

import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..data.demo_corpus import make_corpus, read_sources
from ..expert_metrics import AUXILIARY_LOSS, METRICS
from ..metrics_file import TRAINING_LOSS, read_metrics
from . import ranks
from .layouts import GLOBAL_BATCH, MODELS, Layout

STEPS = 10
_LOSSES = re.compile(f"{TRAINING_LOSS}|{AUXILIARY_LOSS}|{METRICS}/")
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
    # AdamW divides by the size of the gradient, and so amplifies the rounding of tiny ones
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
        loss: deviation of the losses and of the experts' shares.
        grad_norm: deviation of the norm of the whole gradient.
        parameter: deviation of the norm of one parameter's gradient. Errors in small parameters do
            not show in the whole gradient.
    """

    loss: float
    grad_norm: float
    parameter: float

    def __str__(self) -> str:
        return " ".join(f"{value:.0e}" for value in (self.loss, self.grad_norm, self.parameter))

    def within(self, tolerance: float) -> bool:
        """Return whether all deviations are within the tolerance."""
        return max(self.loss, self.grad_norm, self.parameter) <= tolerance


@dataclass(frozen=True)
class Result:
    """The result of a layout and a model.

    Attributes:
        layout: name of the layout.
        model: name of the model.
        processes: number of processes.
        superposition: deviation in superposition; None if the run failed.
        recovery: deviation in recovery; None if the run failed.
        tolerance: tolerance of each deviation.
        seconds: duration of the comparison.
        error: the end of the log of the process that failed; "" if none failed.
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
        """Whether the run agrees with one process in both phases."""
        phases = (self.superposition, self.recovery)
        return all(phase is not None and phase.within(self.tolerance) for phase in phases)


class Step(NamedTuple):
    """The numbers of a step.

    Attributes:
        losses: the loss, and for a mixture of experts the auxiliary loss and the experts' shares.
        grad_norm: norm of the whole gradient.
        parameters: norms of each parameter's gradient, on the ranks that have it.
    """

    losses: dict[str, float]
    grad_norm: float
    parameters: dict[str, list[float]]


class Runs:
    """Runs of layouts in a folder, and runs of one process to compare with.

    Args:
        folder: folder of the runs; emptied first.
        steps: steps of each run; the first half is in superposition.

    Attributes:
        job: arguments of all runs.
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
        """Compare a layout's run with one process's.

        Raises:
            RuntimeError: if the run of one process fails.
        """
        begun = time.monotonic()
        of_one = self.of_one_process(*MODELS[model], *layout.job)
        folder = self.folder / re.sub(r"\W+", "-", f"{model} {layout.name}")
        arguments = (*MODELS[model], *layout.arguments)
        of_many, error = self._run(arguments, layout.processes, folder)
        phases = (slice(self.boundary), slice(self.boundary, self.steps))
        superposition, recovery = (
            None if error else deviation(of_many[p], of_one[p]) for p in phases
        )
        return Result(
            layout.name,
            model,
            layout.processes,
            superposition,
            recovery,
            layout.tolerance,
            time.monotonic() - begun,
            error,
        )

    def of_one_process(self, *arguments: str) -> list[Step]:
        """Return the steps of a run of one process with these arguments.

        Raises:
            RuntimeError: if the run fails.
        """
        if arguments not in self._references:
            folder = self.folder / f"one-process-{len(self._references)}"
            of_one, error = self._run(arguments, 1, folder)
            if error:
                raise RuntimeError(f"One process with {' '.join(arguments)} failed:\n{error}")
            self._references[arguments] = of_one
        return self._references[arguments]

    def seed(self, arguments: Sequence[str]) -> Path:
        """Return the folder of the seed checkpoint for the model in these arguments.

        Raises:
            RuntimeError: if it cannot be written.
        """
        of_model = [argument for argument in arguments if argument.startswith("--model.")]
        folder = self.folder / re.sub(r"\W+", "-", f"seed {' '.join(of_model)}")
        if not folder.exists():
            seed_only = "--checkpoint.create_seed_checkpoint"
            if error := ranks.run([*self.job, *of_model, seed_only], 1, folder):
                raise RuntimeError(
                    f"Could not write a seed checkpoint with {' '.join(of_model)}:\n{error}"
                )
        return folder / "checkpoint"

    def train(self, arguments: Sequence[str], processes: int, folder: Path) -> str | None:
        """Train the job with these arguments from the seed checkpoint, as :func:`ranks.run`."""
        shutil.copytree(self.seed(arguments), folder / "checkpoint")
        whole_job = [*self.job, *arguments, "--checkpoint.load_step=0"]
        return ranks.run(whole_job, processes, folder)

    def _run(
        self, arguments: tuple[str, ...], processes: int, folder: Path
    ) -> tuple[list[Step], str]:
        """Return the steps, and why there are none or ""."""
        if error := self.train(arguments, processes, folder):
            return [], error
        lines, gradients = read_metrics(folder), ranks.gradient_norms(folder)
        assert [line["step"] for line in lines] == list(range(1, self.steps + 1))
        return [
            Step({k: line[k] for k in line if _LOSSES.match(k)}, line["grad_norm"], norms)
            for line, norms in zip(lines, gradients, strict=True)
        ], ""


def deviation(steps: list[Step], of_one: list[Step]) -> Deviation:
    """Return the largest deviations of steps from those of one process."""
    pairs = list(zip(steps, of_one, strict=True))
    assert pairs and all(a.parameters.keys() == b.parameters.keys() for a, b in pairs)
    assert all(a.losses.keys() == b.losses.keys() for a, b in pairs)
    return Deviation(
        max(relative(a.losses[name], loss) for a, b in pairs for name, loss in b.losses.items()),
        max(relative(a.grad_norm, b.grad_norm) for a, b in pairs),
        max(
            relative(norm, b.parameters[name][0])
            for a, b in pairs
            for name, norms in a.parameters.items()
            for norm in norms
        ),
    )


def relative(value: float, reference: float) -> float:
    """Return the relative deviation of a value; infinite from 0 and for values that are NaN."""
    if value == reference:
        return 0.0
    deviation = abs(value - reference) / abs(reference) if reference else math.inf
    return math.inf if math.isnan(deviation) else deviation
