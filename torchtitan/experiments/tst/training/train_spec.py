"""Add superposition to a model's ``TrainSpec``: data, bag embedding, head, losses, metrics."""

import dataclasses
import functools
from typing import Any

from torch import nn
from torchtitan.components.validate import build_validator as upstream_build_validator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.protocols.train_spec import TrainSpec

from ..checks.model import check_modules, check_parallel
from ..config.job_config import lm_head_section
from ..core import BagEmbedding, LossHead
from ..data.build import build_dataloader
from ..data.tokenizer import tokenizer_builder
from ..upstream.parallelize import averages_gradients, parallelize
from .experts import LoadBalancer
from .metrics import MetricsRun, build_metrics_processor
from .phase_loss import PhaseLoss
from .validate import build_validator


def superposition_train_spec(
    spec: TrainSpec,
    job_config: JobConfig,
    run: MetricsRun,
    load_balancer: LoadBalancer | None = None,
) -> TrainSpec:
    """Return a train spec for both phases; the model's parameters and state dict do not change.

    Args:
        spec: train spec of the model.
        job_config: config of the job.
        run: the run that the metrics describe.
        load_balancer: load balancer of the model's experts; None without experts.

    Raises:
        ConfigError: when the model is built, from :func:`..checks.model.check_modules` and
            :func:`..checks.model.check_parallel`.
    """
    if load_balancer:
        spec = _with_experts(spec, load_balancer)
    return dataclasses.replace(
        spec,
        model_cls=functools.partial(_build_model, spec.model_cls, job_config),
        parallelize_fn=functools.partial(_parallelize, spec.parallelize_fn),
        build_tokenizer_fn=tokenizer_builder(spec.build_tokenizer_fn),
        build_dataloader_fn=(
            build_dataloader
            if spec.build_dataloader_fn is build_text_dataloader
            else spec.build_dataloader_fn
        ),
        build_loss_fn=functools.partial(PhaseLoss, spec.build_loss_fn),
        build_metrics_processor_fn=(
            spec.build_metrics_processor_fn or functools.partial(build_metrics_processor, run)
        ),
        build_validator_fn=(
            build_validator
            if spec.build_validator_fn is upstream_build_validator
            else spec.build_validator_fn
        ),
    )


def _with_experts(spec: TrainSpec, load_balancer: LoadBalancer) -> TrainSpec:
    """Return a train spec whose experts are counted and balanced."""

    def build_model(model_args: Any) -> nn.Module:
        return spec.model_cls(load_balancer.model_args(model_args))  # type: ignore[return-value]

    return dataclasses.replace(
        spec,
        model_cls=build_model,
        parallelize_fn=functools.partial(load_balancer.parallelize, spec.parallelize_fn),
        build_optimizers_fn=load_balancer.optimizers_builder(spec.build_optimizers_fn),
    )


def _build_model(model_cls: Any, job_config: JobConfig, model_args: Any) -> nn.Module:
    """Build a model, and replace its embedding and, with chunks, its LM head."""
    model = model_cls(model_args)
    check_modules(job_config, model)
    model.tok_embeddings = BagEmbedding.from_embedding(model.tok_embeddings)
    if (chunks := lm_head_section(job_config).chunks) > 1:
        model.output = LossHead.from_linear(model.output, chunks)
    return model


def _parallelize(
    upstream: Any, model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Parallelize a model with its own function, and check that this did what the job asks for."""
    parallel = parallelize(upstream, model, parallel_dims, job_config)
    check_parallel(job_config, parallel, parallel_dims, averages_gradients(parallel))
    return parallel
