"""A model's ``TrainSpec`` with superposition: data, bag embedding, bag loss, metrics."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import LossFunction
from torchtitan.components.validate import build_validator as upstream_build_validator
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.logging import logger

from .core import BagEmbedding, BagLoss
from .data.build import build_dataloader
from .job_config import superposition_section
from .metrics import build_metrics_processor
from .validate import build_validator


def superposition_train_spec(spec: TrainSpec) -> TrainSpec:
    """``spec`` made ready for both phases; parameters and state dict stay as they are."""
    return dataclasses.replace(
        spec,
        model_cls=functools.partial(_build_model, spec.model_cls),
        build_dataloader_fn=(
            build_dataloader
            if spec.build_dataloader_fn is build_text_dataloader
            else spec.build_dataloader_fn
        ),
        build_loss_fn=functools.partial(PhaseLoss, spec.build_loss_fn),
        build_metrics_processor_fn=spec.build_metrics_processor_fn or build_metrics_processor,
        build_validator_fn=(
            build_validator
            if spec.build_validator_fn is upstream_build_validator
            else spec.build_validator_fn
        ),
    )


def _build_model(model_cls: type[nn.Module], model_args: Any) -> nn.Module:
    model = model_cls(model_args)
    embedding = getattr(model, "tok_embeddings", None)
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(
            f"{model_cls.__name__} has no nn.Embedding `tok_embeddings` to put bags into"
        )
    model.tok_embeddings = BagEmbedding.from_embedding(embedding)
    return model


class PhaseLoss:
    """A ``LossFunction`` for both phases: what the labels look like decides.

    Ordinary labels (B, L) go to upstream's loss, untouched; bags of labels (B, L, s) to
    :class:`BagLoss`, as a sum with the ``coefficients`` that the trainer sets at each step.
    """

    def __init__(
        self, build_ordinary: Callable[..., LossFunction], job_config: JobConfig, **kwargs: Any
    ):
        self.ordinary = build_ordinary(job_config, **kwargs)
        section = superposition_section(job_config)
        self.bag_loss = BagLoss(section.loss, section.weighting)
        self.coefficients: torch.Tensor | None = None  # float32, see BagLoss.sum
        self._sum = self.bag_loss.sum
        if job_config.compile.enable and "loss" in job_config.compile.components:
            logger.info("Compiling the bag loss with torch.compile")
            self._sum = torch.compile(self._sum, backend=job_config.compile.backend)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The summed loss of logits (B, L, V), as upstream's trainer expects it."""
        if labels.ndim == 2:
            return self.ordinary(logits, labels)
        assert self.coefficients is not None, "the trainer sets them before each step"
        if isinstance(logits, DTensor):  # sharded over the vocabulary by loss parallel
            logits = logits.full_tensor()
        return self._sum(logits, labels, self.coefficients)
