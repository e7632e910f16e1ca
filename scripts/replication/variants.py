"""Variants of TST that docs/experiments.md tries, as a module for `tst train --module`.

VARIANT=next_tokens PYTHONPATH=scripts tst train JOB.toml --module replication.variants
"""

import dataclasses
import os
from collections.abc import Iterator

import torch
from typing_extensions import override

from torchtitan import train as upstream
from torchtitan.experiments.tst.core import Phase, fold
from torchtitan.experiments.tst.data.loader import Batch
from torchtitan.experiments.tst.train import main
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

NEXT_TOKENS = 4


class NextTokens(SuperpositionTrainer):
    """Recovery that also predicts the three tokens after the next, with less and less weight.

    Weights 1, 1/2, 1/4, 1/8, all but the first times a factor that falls to 0 in the first half
    of recovery.
    """

    @override
    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        if self.schedule.phase(self.step) is Phase.RECOVERY and self._factor() > 0:
            data_iterator = self._with_next_tokens(data_iterator)
        super().train_step(data_iterator)

    def _factor(self) -> float:
        done = self.step - self.schedule.boundary
        return 1 - done / (0.5 * (self.job_config.training.steps - self.schedule.boundary))

    def _with_next_tokens(self, data_iterator: Iterator[Batch]) -> Iterator[Batch]:
        batches = []
        for _ in range(self.gradient_accumulation_steps):
            inputs, labels = next(data_iterator)
            inputs["input"], labels = fold(inputs["input"], labels, NEXT_TOKENS, "output")
            batches.append((inputs, labels))
        counts = sum(self.loss_fn.bag_loss.counts(labels) for _, labels in batches)
        targets = sum((labels != -100).sum() for _, labels in batches)
        weights = torch.tensor([1, *(self._factor() / 2**n for n in range(1, NEXT_TOKENS))])
        self._coefficients = (weights / counts * targets).float()  # one process
        yield from batches


class PowerLawFirst(SuperpositionTrainer):
    """Power-law weights in the first stage, uniform ones in the others."""

    @override
    def _loss_coefficients(self, labels: list[torch.Tensor]) -> torch.Tensor:
        first = self.step <= self.schedule.stages[0].last
        weighting = "power_law" if first else "uniform"
        self.loss_fn.bag_loss = dataclasses.replace(self.loss_fn.bag_loss, weighting=weighting)
        return super()._loss_coefficients(labels)


if __name__ == "__main__":
    variant = {"next_tokens": NextTokens, "power_law_first": PowerLawFirst}[os.environ["VARIANT"]]
    upstream_main = upstream.main
    upstream.main = lambda _: upstream_main(variant)
    main()
