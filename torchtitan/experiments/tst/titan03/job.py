"""The config of TorchTitan 0.3 for a job of TorchTitan 0.2.2."""

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.optimizer import ParamGroupConfig as ParamGroup
from torchtitan.components.quantization import Float8GroupedExpertsConverter, Float8LinearConverter
from torchtitan.config import (
    CommConfig,
    CompileConfig,
    DebugConfig,
    ParallelismConfig,
    TrainingConfig,
)
from torchtitan.distributed.activation_checkpoint import (
    ActivationCheckpointing,
    FullAC,
    MemoryBudgetAC,
    SelectiveAC,
)
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.profiler import Profiler
from torchtitan.trainer import Trainer

from ..config.layout import compiles
from ..config.sections import LoadBalance
from ..errors import ArgumentError, ConfigTextError, in_one_line
from .counterparts import COPIED, FLOAT8, FLOAT8_EXPERTS, check_counterparts
from .job_config import keys_of
from .job_data import training_data, validation_data
from .job_parts import JobValidator, LayerwiseAC
from .models import args_of, model_spec
from .superposed import superposed
from .trainer import SuperpositionTrainer

_QKV = ("wq", "wk", "wv")  # one module in 0.3, wqkv


def to_config(job: Any) -> SuperpositionTrainer.Config:
    """Return the config of TorchTitan 0.3 that trains a job.

    Args:
        job: result of :func:`.job_config.read`.

    Raises:
        ConfigError: if keys of the job have no counterpart, or TorchTitan refuses a value.
    """
    check_counterparts(job)
    try:
        balance = LoadBalance(**vars(job.load_balance))
        return superposed(_config(job), load_balance=balance, **vars(job.superposition))
    except ArgumentError:
        raise
    except (AssertionError, ImportError, NotImplementedError, ValueError) as error:
        raise ConfigTextError(f"TorchTitan 0.3 refuses the job: {in_one_line(error)}") from error


def _config(job: Any) -> Trainer.Config:
    """Return the config of an ordinary run."""
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in keys_of(job).items():
        if key in COPIED:
            section, _, name = COPIED[key].rpartition(".")
            values[section][name] = value
    layout = job.parallelism
    # As 0.2.2. With 0.3's default, spmd_types, torch 2.13 refuses more than one rank.
    values["parallelism"]["spmd_backend"] = "partial_dtensor"
    values["parallelism"]["module_fqns_per_model_part"] = _stages(layout)
    values["training"]["disable_cuda_graphs"] = not _can_use_cuda_graphs(job)
    values["checkpoint"]["initial_load_path"] = _absolute(job.checkpoint.initial_load_path)
    values["compile"]["enable_async_tensor_parallel"] = (
        layout.enable_async_tensor_parallel and layout.tensor_parallel_degree > 1
    )
    spec = _model(job)
    return Trainer.Config(
        **values[""],
        model_spec=spec,
        loss=_loss(job, spec),
        optimizer=_optimizer(job),
        lr_scheduler=LRSchedulersContainer.Config(**values["lr_scheduler"]),
        training=TrainingConfig(**values["training"]),
        dataloader=training_data(job),
        validator=JobValidator.Config(**values["validator"], dataloader=validation_data(job)),
        parallelism=ParallelismConfig(**values["parallelism"]),
        checkpoint=CheckpointManager.Config(**values["checkpoint"]),
        activation_checkpoint=_recomputation(job),
        compile=CompileConfig(**values["compile"]),
        comm=CommConfig(**values["comm"]),
        debug=DebugConfig(**values["debug"]),
        metrics=MetricsProcessor.Config(**values["metrics"]),
        profiler=Profiler.Config(**values["profiler"]),
    )


def _stages(layout: Any) -> list[list[str]] | None:
    """Return the modules of each stage of the pipeline; the LM head has another name in 0.3."""
    if layout.module_fqns_per_model_part is None:
        return None
    return [
        ["lm_head" if name == "output" else name for name in stage]
        for stage in layout.module_fqns_per_model_part
    ]


def _absolute(path: str | None) -> str | None:
    """Return a path as 0.3 wants it; it may be on another file system."""
    return path if path is None or "://" in path else str(Path(path).absolute())


def _can_use_cuda_graphs(job: Any) -> bool:
    """Return whether a step has a fixed shape and never waits for the GPU."""
    layout, args = job.parallelism, args_of(job.model.name, job.model.flavor)
    in_turn = "moe_args" in args and not args["moe_args"]["use_grouped_mm"]
    waits = (
        in_turn
        or job.load_balance.method == "auxiliary_loss"
        or args["attn_type"] == "varlen"
        or job.training.enable_cpu_offload
        or layout.expert_parallel_degree > 1
        or layout.pipeline_parallel_degree > 1
    )
    return torch.cuda.is_available() and not waits


def _model(job: Any) -> ModelSpec:
    """Return the model, with the converters of the job applied."""
    layout, balance = job.parallelism, job.load_balance
    spec = model_spec(
        job.model.name,
        job.model.flavor,
        seq_len=job.training.seq_len,
        expert_backend=(
            layout.expert_parallel_comm_backend if layout.expert_parallel_degree > 1 else "standard"
        ),
        bias_step=balance.coefficient if balance.method == "bias" else None,
    )
    compiled, float8 = compiles(job, "model"), job.quantize.linear.float8
    configs: dict[str, Any] = {
        FLOAT8: lambda: Float8LinearConverter.Config(
            recipe_name=float8.recipe_name,
            filter_fqns=_renamed(float8.filter_fqns),
            emulate=float8.emulate,
            model_compile_enabled=compiled,
        ),
        FLOAT8_EXPERTS: lambda: Float8GroupedExpertsConverter.Config(
            model_compile_enabled=compiled
        ),
    }
    model = spec.model
    for name in job.model.converters:
        model = configs[name]().build().convert(model)
    return dataclasses.replace(spec, model=model)


def _renamed(names: list[str]) -> list[str]:
    """Return parts of the names of modules as 0.3 calls them."""
    renamed = []
    for name in names:
        owner, _, last = name.rpartition(".")
        if last in _QKV:
            name = "wqkv" if not owner else f"{owner}.qkv_linear.wqkv"
        renamed.append("lm_head" if name == "output" else name)
    return renamed


def _loss(job: Any, spec: ModelSpec) -> BaseLoss.Config:
    loss = CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)
    chunks = job.lm_head.chunks
    return loss if chunks == 1 else ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=loss)


def _optimizer(job: Any) -> OptimizersContainer.Config:
    """Return the optimizer of all parameters: 0.2.2 decays norms and embeddings, too."""
    section = job.optimizer
    options = {
        "lr": section.lr,
        "betas": (section.beta1, section.beta2),
        "eps": section.eps,
        "weight_decay": section.weight_decay,
    }
    return OptimizersContainer.Config(
        param_groups=[
            ParamGroup(pattern=".*", optimizer_name=section.name, optimizer_kwargs=options)
        ],
        implementation=section.implementation,
    )


def _recomputation(job: Any) -> ActivationCheckpointing.Config | None:
    """Return the activation checkpointing; None for none."""
    section = job.activation_checkpoint
    options = {
        name: getattr(section, name)
        for name in ("preserve_rng_state", "determinism_check", "debug")
    }
    if section.mode == "none":
        return None
    if section.mode == "full":
        return FullAC.Config(**options)
    if section.mode == "memory_budget":
        return MemoryBudgetAC.Config(
            memory_budget=section.memory_budget,
            visualize_memory_budget_pareto=section.visualize_memory_budget_pareto,
            **options,
        )
    if section.selective_ac_option != "op":
        return LayerwiseAC.Config(every=int(section.selective_ac_option), **options)
    return SelectiveAC.Config(
        force_recompute_mm_shapes_by_fqns=(section.per_op_sac_force_recompute_mm_shapes_by_fqns),
        **options,
    )
