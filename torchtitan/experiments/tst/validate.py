"""Validation: always ordinary next-token loss, always on the same data."""

from typing import Any

import torchtitan.components.validate as upstream
from torch import nn
from torchtitan.components.validate import Validator
from typing_extensions import override

from .data.build import build_validation_dataloader
from .phase_loss import PhaseLoss


class FixedSetValidator(Validator):
    """Upstream's validator, each time from the start of the validation data.

    Upstream's goes on where the last validation stopped, and anywhere after a resume, so that
    losses of different steps would be of different data. The data may also be token shards.
    """

    loss_fn: PhaseLoss

    def __init__(self, *args: Any, **kwargs: Any):
        build = upstream.build_text_validation_dataloader
        upstream.build_text_validation_dataloader = build_validation_dataloader
        try:
            super().__init__(*args, **kwargs)
        finally:
            upstream.build_text_validation_dataloader = build
        self._start = self.validation_dataloader.state_dict()

    @override
    def post_dataloading_process(self, *args: Any) -> tuple:
        _, labels, *_ = batch = super().post_dataloading_process(*args)
        self.loss_fn.expect(labels)
        return batch

    @override
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        self.validation_dataloader.load_state_dict(self._start)
        super().validate(model_parts, step)


def build_validator(**kwargs: Any) -> FixedSetValidator:
    """A ``TrainSpec.build_validator_fn``."""
    return FixedSetValidator(**kwargs)
