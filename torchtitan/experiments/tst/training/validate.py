"""Validation, always with ordinary next-token loss and on the same data."""

import math
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torchtitan.components.validate as upstream
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.validate import Validator
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols import ModelProtocol
from typing_extensions import override

from ..core import IGNORE_INDEX
from ..data.build import announce_text, build_validation_dataloader
from ..upstream.parallelize import forget_shapes
from ..upstream.replaced import replaced
from .phase_loss import PhaseLoss, Targets, loss_heads


class FixedSetValidator(Validator):
    """Upstream's validator, which starts each time at the beginning of the validation data.

    Upstream's own continues where the last validation stopped, and at an arbitrary place after a
    resume. So losses of different steps would come from different data. The data may also be token
    shards.
    """

    loss_fn: PhaseLoss

    def __init__(self, *args: Any, **kwargs: Any):
        with replaced(upstream, "build_text_validation_dataloader", build_validation_dataloader):
            super().__init__(*args, **kwargs)
        self._start = self.validation_dataloader.state_dict()
        if dist.get_rank() == 0:
            announce_text("validation", self.validation_dataloader)

    @override
    def post_dataloading_process(self, *args: Any) -> tuple:
        inputs, labels, *extra = super().post_dataloading_process(*args)
        divisor = None
        if self._context:
            labels, divisor = self._part_of_context(labels, self._context)
        self.loss_fn.expect(Targets(labels, divisor=divisor), self.heads)
        return inputs, labels, *extra

    @property
    def _context(self) -> DeviceMesh | None:
        return self.parallel_dims.get_optional_mesh("cp")

    def _part_of_context(
        self, labels: torch.Tensor, mesh: DeviceMesh
    ) -> tuple[torch.Tensor, float]:
        """Return the labels of this rank's part of each sequence, and a divisor of their loss.

        Upstream divides the loss of each part by the targets of that part, and sums the results.
        With this divisor, the sum is divided by all targets instead. If a part has no targets, it
        gets labels that upstream can count, and an infinite divisor, so that its loss is 0.
        """
        own = (labels != IGNORE_INDEX).sum().float()
        if batch := self.parallel_dims.get_optional_mesh("batch"):
            own = own.new_tensor(dist_utils.dist_sum(own, batch))
        total = dist_utils.dist_sum(own, mesh)
        if own == 0:
            return torch.zeros_like(labels), math.inf
        return labels, total / own.item()

    @override
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        self.validation_dataloader.load_state_dict(self._start)
        self.heads = loss_heads(model_parts)
        if self._context:
            for part in model_parts:
                # Upstream reads this attribute of any model, for a context that it never enters.
                part.freqs_cis = getattr(part, "freqs_cis", None)  # type: ignore[assignment]
        self._forget_shapes()
        with replaced(ModelProtocol, "get_attention_masks", _no_masks):
            super().validate(model_parts, step)
        self._forget_shapes()

    def _forget_shapes(self) -> None:
        """Forget the shapes of a pipeline, because training and validation have different ones."""
        if self.parallel_dims.pp_enabled:
            forget_shapes(self.pp_schedule)


def _no_masks(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for a model's ``get_attention_masks`` where the model defines none.

    Upstream's validator expects this error. The default method raises another one.
    """
    raise TypeError


def build_validator(**kwargs: Any) -> FixedSetValidator:
    """Build the validator, as ``TrainSpec.build_validator_fn``."""
    return FixedSetValidator(**kwargs)
