"""The loss of both phases, for TorchTitan 0.3's loss API."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.loss import BaseLoss, CrossEntropyLoss
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.tools.logging import logger
from typing_extensions import override

from ..core import BagLoss


class PhaseLoss(BaseLoss):
    """TorchTitan's cross-entropy for next tokens, and :class:`~..core.BagLoss` for bags.

    It may be the loss of a ``ChunkedLossWrapper``, which cuts labels along the sequence.

    Args:
        config: its config.
        compile_config: TorchTitan's ``compile`` section.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """The losses of the phases."""

        ordinary: CrossEntropyLoss.Config = field(default_factory=CrossEntropyLoss.Config)
        """The loss of next tokens."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        self.ordinary = config.ordinary.build(compile_config=compile_config)
        self.vocabulary = config.ordinary.global_vocab_size
        self.compile_config = compile_config

    def use(self, bag_loss: BagLoss) -> None:
        """Set the loss of bags; the trainer does so, because it knows the section."""
        self.bag_loss, self.fn = bag_loss, bag_loss.sum
        options = self.compile_config
        if options and options.enable and "loss" in options.components:
            logger.info("Compiling the bag loss with torch.compile")
            # Compile for each bag size separately: code for any bag size would be slower.
            self.fn = torch.compile(self.fn, backend=options.backend, dynamic=False)

    @override
    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss as TorchTitan's trainer expects it, and no metrics.

        Args:
            pred: logits (B, L, V), or this rank's part of the vocabulary.
            labels: next tokens (B, L), or bags of targets (B, L, s).
            global_valid_tokens: number of valid labels of the step; for bags, the coefficients of
                their loss, see :meth:`BagLoss.coefficients`.
            kwargs: passed on to the loss of next tokens.
        """
        if labels.ndim == 2:
            return self.ordinary(pred, labels, global_valid_tokens, **kwargs)
        assert global_valid_tokens is not None  # validation has no bags
        return self.fn(self._with_mesh(pred), labels, global_valid_tokens), {}

    def _with_mesh(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits that are one rank's part of the vocabulary as a DTensor of the whole."""
        if isinstance(logits, DTensor) or spmd_mesh_size("tp") == 1:
            return logits
        mesh = current_spmd_mesh()
        assert mesh is not None
        shape = torch.Size([*logits.shape[:-1], self.vocabulary])
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            logits, mesh["tp"], [Shard(-1)], run_check=False, shape=shape, stride=strides
        )
