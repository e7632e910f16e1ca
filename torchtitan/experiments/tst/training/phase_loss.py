"""The loss of both phases, computed from logits or in the LM head."""

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

from ..config.job_config import lm_head_section, superposition_section
from ..config.layout import compiles
from ..core import BagLoss, LossHead
from ..errors import ConfigError
from ..upstream.names import FakeTensor


@dataclass(frozen=True)
class Targets:
    """The targets of the next forward.

    Attributes:
        labels: next tokens (B, L), or bags of them (B, L, s), sharded like the model's input.
        coefficients: coefficients of the bag loss, float32, see :meth:`BagLoss.sum`; None for next
            tokens.
        divisor: divisor of the sum where upstream does not divide correctly: in pipelines, and in
            validation with context parallelism. Otherwise None.
    """

    labels: torch.Tensor
    coefficients: torch.Tensor | None = None
    divisor: torch.Tensor | float | None = None


class PhaseLoss:
    """A ``LossFunction`` for both phases.

    Next-token targets use upstream's loss unchanged; bags use :class:`BagLoss`. Call :meth:`expect`
    with the targets before each forward. If the model has a :class:`LossHead`, the model returns
    the loss instead of logits, and this class only passes it on.
    """

    def __init__(
        self, build_ordinary: Callable[..., LossFunction], job_config: JobConfig, **kwargs: Any
    ):
        self.ordinary = build_ordinary(job_config, **kwargs)
        section = superposition_section(job_config)
        # The trainer does not use the logits after backward.
        self.bag_loss = BagLoss(section.loss, section.weighting, overwrite_logits=True)
        self.gathers_logits = job_config.parallelism.disable_loss_parallel
        self._targets: Targets | None = None
        self._in_head = False
        self._chunk_losses: list[torch.Tensor] | None = []  # until the first loss is checked
        self.job_config = job_config
        self._sum = self.bag_loss.sum
        if compiles(job_config, "loss"):
            logger.info("Compiling the bag loss with torch.compile")
            # Compile for each bag size separately: code for any bag size would be slower.
            self._sum = torch.compile(self._sum, backend=job_config.compile.backend, dynamic=False)

    def expect(self, targets: Targets, heads: Sequence[LossHead] = ()) -> None:
        """Set the targets of the next forward.

        Args:
            targets: targets of this rank's part of the micro-batch.
            heads: LM heads that compute the loss, from :func:`loss_heads`.
        """
        self._targets, self._in_head = targets, bool(heads)
        for head in heads:
            head.expect(targets.labels, functools.partial(self._of_chunk, targets))

    def __call__(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed loss, as upstream's trainer expects it, divided by ``divisor``.

        Args:
            output: logits (B, L, V), or the loss if the model has a :class:`LossHead`.
            labels: labels of the targets; in a pipeline, those of one microbatch.
        """
        if not self._in_head:
            assert self._targets is not None, "call expect() before each forward"
            return self._of_logits(self._targets, output, labels)
        loss = _whole(output).squeeze()
        self._check_head(loss.detach())
        return loss

    def _check_head(self, loss: torch.Tensor) -> None:
        """Check, at the first loss, that the model returns the loss of its head as it is.

        Raises:
            ConfigError: if the model changes it, for example by a soft cap for logits.
        """
        if self._chunk_losses is None:
            return
        parts, self._chunk_losses = self._chunk_losses, None
        if isinstance(loss, FakeTensor) or (loss.ndim == 0 and not loss.isfinite()):
            return
        if parts and loss.ndim == 0 and torch.allclose(loss, torch.stack(parts).sum(), rtol=1e-3):
            return
        raise ConfigError(
            "lm_head.chunks",
            lm_head_section(self.job_config).chunks,
            f"must be 1: forward of model.name = {self.job_config.model.name!r} does not return "
            "what its LM head returns",
        )

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

    def _of_chunk(
        self, targets: Targets, logits: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        loss = self._of_logits(targets, logits, labels)
        if self._chunk_losses is not None:
            self._chunk_losses.append(_whole(loss.detach()))
        return loss


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loss_heads(model_parts: Sequence[nn.Module]) -> list[LossHead]:
    """Return the LM heads that compute the loss themselves."""
    heads = [getattr(model, "output", None) for model in model_parts]
    return [head for head in heads if isinstance(head, LossHead)]
