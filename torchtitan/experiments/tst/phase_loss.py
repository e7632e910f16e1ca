"""The loss of both phases, of logits or in the LM head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import LossFunction
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from .core import BagLoss, LossHead
from .job_config import compiles, superposition_section


class PhaseLoss:
    """A ``LossFunction`` for both phases: what the labels look like decides.

    Ordinary labels (B, L) go to upstream's loss, untouched; bags of labels (B, L, s) to
    :class:`BagLoss`, as a sum with the ``coefficients`` that the trainer sets at each step.

    Where the model has a :class:`LossHead`, :meth:`bind` it to this loss, and let it :meth:`expect`
    the labels before each forward: what the model gives is then the loss, and passes through here.

    Attributes:
        coefficients: of the bag loss, float32; see :meth:`BagLoss.sum`.
        divisor: of the sum, where upstream does not divide it as it should: in pipelines, and in
            validation under context parallelism.
    """

    coefficients: torch.Tensor | None = None
    divisor: torch.Tensor | float | None = None

    def __init__(
        self, build_ordinary: Callable[..., LossFunction], job_config: JobConfig, **kwargs: Any
    ):
        self.ordinary = build_ordinary(job_config, **kwargs)
        section = superposition_section(job_config)
        # the trainer keeps no logits over backward
        self.bag_loss = BagLoss(section.loss, section.weighting, overwrite_logits=True)
        self.gathers_logits = job_config.parallelism.disable_loss_parallel
        self.heads: list[LossHead] = []
        self._sum = self.bag_loss.sum
        if compiles(job_config, "loss"):
            logger.info("Compiling the bag loss with torch.compile")
            self._sum = torch.compile(self._sum, backend=job_config.compile.backend)

    def bind(self, model_parts: list[nn.Module]) -> None:
        """Be the loss of the heads that compute it themselves."""
        heads = [getattr(model, "output", None) for model in model_parts]
        self.heads = [head for head in heads if isinstance(head, LossHead)]
        for head in self.heads:
            head.loss_fn = self

    def expect(self, labels: torch.Tensor) -> None:
        """Of the next forward, (B, L) or (B, L, s)."""
        for head in self.heads:
            head.expect(labels)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The summed loss of logits (B, L, V), as upstream's trainer wants it, over ``divisor``."""
        if logits.ndim < 2:  # a LossHead's loss, which it has from here
            loss = logits.full_tensor() if isinstance(logits, DTensor) else logits
            return loss.squeeze()
        loss = self._summed(logits, labels)
        return loss if self.divisor is None else loss / self.divisor

    def _summed(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.ndim == 2:
            if isinstance(logits, DTensor) and self.gathers_logits:
                logits = logits.full_tensor()
            return self.ordinary(logits, labels)
        assert self.coefficients is not None, "the trainer sets them before each step"
        return self._sum(logits, labels, self.coefficients)
