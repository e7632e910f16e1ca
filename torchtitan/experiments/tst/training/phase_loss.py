"""The loss of both phases, of logits or in the LM head."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import LossFunction
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from ..config.layout import compiles
from ..config.sections import superposition_section
from ..core import BagLoss, LossHead


@dataclass(frozen=True)
class Targets:
    """What the loss of the next forward is to be of.

    Attributes:
        labels: next tokens (B, L), or bags of them (B, L, s), as the model's input is laid out.
        coefficients: of the bag loss, float32, see :meth:`BagLoss.sum`; None for next tokens.
        divisor: of the sum, where upstream does not divide it as it should: in pipelines, and in
            validation under context parallelism.
    """

    labels: torch.Tensor
    coefficients: torch.Tensor | None = None
    divisor: torch.Tensor | float | None = None


class PhaseLoss:
    """A ``LossFunction`` for both phases.

    Next-token targets go to upstream's loss, untouched; bags to :class:`BagLoss`. Before each
    forward, :meth:`expect` says which it is. Where the model has a :class:`LossHead`, the model
    gives the loss and no logits, and it passes through here.
    """

    def __init__(
        self, build_ordinary: Callable[..., LossFunction], job_config: JobConfig, **kwargs: Any
    ):
        self.ordinary = build_ordinary(job_config, **kwargs)
        section = superposition_section(job_config)
        # the trainer keeps no logits over backward
        self.bag_loss = BagLoss(section.loss, section.weighting, overwrite_logits=True)
        self.gathers_logits = job_config.parallelism.disable_loss_parallel
        self._targets: Targets | None = None
        self._in_head = False
        self._sum = self.bag_loss.sum
        if compiles(job_config, "loss"):
            logger.info("Compiling the bag loss with torch.compile")
            # for each stage's bag size on its own: for any, it would be slower
            self._sum = torch.compile(self._sum, backend=job_config.compile.backend, dynamic=False)

    def expect(self, targets: Targets, heads: Sequence[LossHead] = ()) -> None:
        """Say what the next forward is to be compared with.

        Args:
            targets: of this rank's part of the micro-batch.
            heads: of the model, from :func:`loss_heads`.
        """
        self._targets, self._in_head = targets, bool(heads)
        for head in heads:
            head.expect(targets.labels, functools.partial(self._of_logits, targets))

    def __call__(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The summed loss, as upstream's trainer wants it, over ``divisor``.

        Args:
            output: logits (B, L, V), or the loss where the model has a :class:`LossHead`.
            labels: those of the targets; in a pipeline, those of its microbatch.
        """
        if not self._in_head:
            assert self._targets is not None, "expect() comes before each forward"
            return self._of_logits(self._targets, output, labels)
        loss = output.full_tensor() if isinstance(output, DTensor) else output
        return loss.squeeze()

    def _of_logits(
        self, targets: Targets, logits: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        if targets.coefficients is not None:
            loss = self._sum(logits, labels, targets.coefficients)
        else:
            if isinstance(logits, DTensor) and self.gathers_logits:
                logits = logits.full_tensor()
            loss = self.ordinary(logits, labels)
        return loss if targets.divisor is None else loss / targets.divisor


def loss_heads(model_parts: Sequence[nn.Module]) -> list[LossHead]:
    """Return the LM heads that compute the loss themselves."""
    heads = [getattr(model, "output", None) for model in model_parts]
    return [head for head in heads if isinstance(head, LossHead)]
