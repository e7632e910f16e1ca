"""Check a config of TorchTitan 0.3 before a device is used."""

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.hf_datasets.text_datasets import (
    ChatDataLoader,
    InterleavedHuggingFaceTextDataLoader,
)
from torchtitan.tools import filesystem

from ..checks.superposition import check_superposition
from ..core import Schedule
from ..errors import ConfigError, ConfigTextError
from .checkpoint import BoundaryCheckpointManager
from .embedding import BagEmbedding
from .loss import PhaseLoss
from .metrics import PhaseMetricsProcessor
from .shards import ShardsDataLoader

_FLEX_BLOCK = 128  # context parallelism of flex attention needs whole blocks on each rank


def check_config(config: Any) -> Schedule:
    """Check that a config can run in both phases.

    Args:
        config: a ``SuperpositionTrainer.Config``.

    Returns:
        Phase and bag size of each step.

    Raises:
        ConfigError: if it cannot; names the key, its value and what is allowed.
    """
    _check_torch(config.parallelism)
    _check_load_balance(config)
    schedule = check_superposition(config.superposition, config.training, config.checkpoint.enable)
    _check_lengths(config, schedule)
    if schedule.enabled:
        _check_bags(config)
    return schedule


def _check_torch(parallelism: Any) -> None:
    """Check that TorchTitan 0.3 works with the installed torch."""
    if not hasattr(dist, "set_timeout"):  # on CPU, titan03.cpu has added it
        raise ConfigTextError(
            f"TorchTitan 0.3 needs torch 2.14 or later on a GPU, and this is torch "
            f"{torch.__version__}: pip install 'torch>=2.14'"
        )
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and parallelism.spmd_backend == "spmd_types" and torch.__version__ < "2.14":
        raise ConfigError(
            "parallelism.spmd_backend",
            parallelism.spmd_backend,
            f"must be partial_dtensor on several ranks with torch {torch.__version__}; "
            "torch 2.14 has both",
        )


def _check_bags(config: Any) -> None:
    """Check what superposition needs of the other sections."""
    section, parallelism = config.superposition, config.parallelism
    _check_loader(config.dataloader)
    if section.scale == "batch" and parallelism.pipeline_parallel_degree > 1:
        raise ConfigError(
            "superposition.scale",
            section.scale,
            'must be "sequence" with pipeline parallelism on TorchTitan 0.3, whose stages keep '
            "their shapes",
        )
    if filesystem.is_remote(config.dump_folder):
        raise ConfigError(
            "dump_folder",
            config.dump_folder,
            "must be a local folder, for metrics.jsonl; checkpoint.folder may be elsewhere",
        )
    if section.reinit_at_recovery:
        raise ConfigError(
            "superposition.reinit_at_recovery",
            section.reinit_at_recovery,
            "must be empty: this ablation needs TorchTitan 0.2.2",
        )
    if parallelism.spmd_backend == "full_dtensor":
        raise ConfigError(
            "parallelism.spmd_backend",
            parallelism.spmd_backend,
            "must be spmd_types or partial_dtensor with superposition",
        )
    if config.debug.spmd_typechecking:
        raise ConfigError(
            "debug.spmd_typechecking", True, "must be false: bags have no types to check"
        )


def check_parts(trainer: Any) -> None:
    """Check that no override has replaced the parts of a trainer that know bags.

    Args:
        trainer: a ``SuperpositionTrainer`` that is built.

    Raises:
        ConfigError: if one has.
    """
    embeddings = [part.tok_embeddings for part in trainer.model_parts]
    ours = (
        all(part is None or isinstance(part, BagEmbedding) for part in embeddings)
        and isinstance(trainer.phase_loss, PhaseLoss)
        and isinstance(trainer.checkpointer, BoundaryCheckpointManager)
        and isinstance(trainer.metrics_processor, PhaseMetricsProcessor)
    )
    if not ours:
        raise ConfigError(
            "override.imports",
            trainer.config.override.imports,
            "must not replace tok_embeddings, the loss, the checkpoint manager or the metrics, "
            "because those of a TST run know bags",
        )


def _check_loader(loader: Any) -> None:
    """Check that windows follow each other, because s of them are joined."""
    if isinstance(loader, InterleavedHuggingFaceTextDataLoader.Config | ChatDataLoader.Config):
        raise ConfigTextError(
            f"dataloader {type(loader).__qualname__}: its windows do not follow each other, and "
            "bags need them to; use HuggingFaceTextDataLoader, or ShardsDataLoader, which mixes "
            "sources, too"
        )
    workers = getattr(loader, "num_workers", 0)
    if workers > 1 and not isinstance(loader, ShardsDataLoader.Config):
        raise ConfigError(
            "dataloader.num_workers",
            workers,
            "must be at most 1 with superposition, because the windows of several workers do not "
            "follow each other",
        )


def _check_lengths(config: Any, schedule: Schedule) -> None:
    """Check that sequences can be cut for parallelism and chunks, in every stage."""
    layout, training, loss = config.parallelism, config.training, config.loss
    tensor = layout.tensor_parallel_degree if layout.enable_sequence_parallel else 1
    context = layout.context_parallel_degree
    chunks = loss.num_chunks if isinstance(loss, ChunkedLossWrapper.Config) else 1
    divisor = math.lcm(tensor, context * chunks)
    if context > 1:
        divisor = math.lcm(divisor, 2 * tensor * context, _FLEX_BLOCK * context)
    lengths = [("training.seq_len", training.seq_len, training.seq_len)]
    for stage in schedule.until(training.steps):
        shape = schedule.batch_shape(stage.first, training.local_batch_size, training.seq_len)
        lengths.append(("training.seq_len", training.seq_len, shape.latents))
    if config.validator.enable and (length := getattr(config.validator, "length", None)):
        lengths.append(("validation.seq_len", length, length))
    for key, value, latents in lengths:
        if latents % divisor:
            raise ConfigError(
                key,
                value,
                f"gives sequences of {latents}, which must be a multiple of {divisor} with tensor "
                f"parallelism {tensor}, context parallelism {context} and {chunks} chunks of the "
                "loss",
            )


def _check_load_balance(config: Any) -> None:
    """Check that the model has experts, and the auxiliary loss a layout that it works with."""
    method, parallelism = config.load_balance.method, config.parallelism
    if method == "upstream":
        return
    spec = config.model_spec
    if not any(getattr(layer, "moe", None) for layer in spec.model.layers):
        raise ConfigError(
            "load_balance.method",
            method,
            f'must be "upstream": {spec.name} {spec.flavor} has no experts',
        )
    if method != "auxiliary_loss":
        return
    if (degree := parallelism.pipeline_parallel_degree) > 1:
        raise ConfigError(
            "parallelism.pipeline_parallel_degree",
            degree,
            'must be 1 with load_balance.method = "auxiliary_loss" on TorchTitan 0.3',
        )
    if parallelism.tensor_parallel_degree > 1 and parallelism.spmd_backend != "partial_dtensor":
        raise ConfigError(
            "parallelism.spmd_backend",
            parallelism.spmd_backend,
            'must be partial_dtensor with load_balance.method = "auxiliary_loss" and tensor '
            "parallelism",
        )
    if torch.cuda.is_available() and not config.training.disable_cuda_graphs:
        raise ConfigError(
            "training.disable_cuda_graphs",
            False,
            'must be true with load_balance.method = "auxiliary_loss"',
        )
