"""Turn a config of TorchTitan 0.3 into one of Token Superposition Training."""

import dataclasses
from typing import Any

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config.manager import custom_registry
from torchtitan.models.common import Embedding
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from ..config.command_line import register_stages
from ..config.sections import LoadBalance, Superposition
from ..errors import ArgumentError
from .checkpoint import BoundaryCheckpointManager
from .embedding import BagEmbedding
from .loss import PhaseLoss
from .metrics import PhaseMetricsProcessor
from .trainer import SuperpositionTrainer

register_stages(custom_registry)  # "8,4,2" on the command line, as on 0.2.2


def superposed(
    config: Trainer.Config, *, load_balance: LoadBalance | None = None, **keys: Any
) -> SuperpositionTrainer.Config:
    """Return the config of a run that begins with superposition.

    The model's parameters, its state dict and every ordinary step stay TorchTitan's own::

        config = superposed(llama3_8b(), bag_size=6, step_ratio=0.3)

    Args:
        config: config of an ordinary run of a decoder, such as a function of
            ``torchtitan.models.llama3.config_registry`` returns. It does not change.
        load_balance: its method "auxiliary_loss" adds the auxiliary loss of the experts. Another
            method changes nothing: the config of the model says whether it has a bias.
        keys: keys of ``[superposition]``, see :class:`~..config.sections.Superposition`.

    Raises:
        ArgumentError: if a part of the config is not TorchTitan's own, so that bags would change
            what it does; names the part.
    """
    spec = config.model_spec
    if type(config) is not Trainer.Config or spec is None:
        raise ArgumentError(f"{type(config).__qualname__}: must be a Trainer.Config with a model")
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return SuperpositionTrainer.Config(
        **parts
        | {
            "model_spec": _with_bags(spec),
            "loss": _loss(config.loss),
            "checkpoint": _as(BoundaryCheckpointManager, config.checkpoint, CheckpointManager),
            "metrics": _as(PhaseMetricsProcessor, config.metrics, MetricsProcessor),
            "superposition": Superposition(**keys),
            "load_balance": load_balance or LoadBalance(),
        }
    )


def _with_bags(spec: ModelSpec) -> ModelSpec:
    """Return the model with a :class:`BagEmbedding`, which has the same parameters."""
    model = spec.model
    if not isinstance(model, Decoder.Config):
        raise ArgumentError(f"model {spec.name}: must be a decoder, not {type(model).__qualname__}")
    embedding = _as(BagEmbedding, model.tok_embeddings, Embedding)
    return dataclasses.replace(spec, model=dataclasses.replace(model, tok_embeddings=embedding))


def _loss(loss: BaseLoss.Config) -> BaseLoss.Config:
    """Return the loss of both phases; a chunked loss stays the outer one, as the trainer asks."""
    if type(loss) is ChunkedLossWrapper.Config:
        return dataclasses.replace(loss, loss_fn=_phase_loss(loss.loss_fn))
    return _phase_loss(loss)


def _phase_loss(loss: BaseLoss.Config) -> PhaseLoss.Config:
    if type(loss) is not CrossEntropyLoss.Config:
        raise ArgumentError(
            f"loss {type(loss).__qualname__}: must be CrossEntropyLoss, alone or in a "
            "ChunkedLossWrapper"
        )
    return PhaseLoss.Config(ordinary=loss)


def _as(ours: Any, config: Any, upstream: Any) -> Any:
    """Return the config of our subclass with the values of TorchTitan's class."""
    if type(config) is not upstream.Config:
        raise ArgumentError(
            f"{type(config).__qualname__}: must be {upstream.__qualname__}.Config, because "
            f"{ours.__qualname__} is a subclass of that"
        )
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return ours.Config(**values)
