"""Check that the keys of TorchTitan's own sections fit together.

TorchTitan itself finds contradictions late, after the model is built, or ignores them.
"""

import math
from pathlib import Path
from typing import Any

import torchtitan.protocols.train_spec as train_spec_module
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    ScheduleDualPipeV,
    ScheduleZBVZeroBubble,
    get_schedule_class,
)
from torchtitan.components.optimizer import (
    build_optimizers,
    build_optimizers_with_moe_load_balancing,
)
from torchtitan.config import JobConfig
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part, pipeline_llm

from ..config.job_config import load_balance_section
from ..config.layout import compiles
from ..errors import ConfigError
from ..upstream.names import CONVERTERS, PipelineScheduleRuntime, compile_backends
from .model import check_module_names, has_experts

_OPTIMIZERS = ("Adam", "AdamW")  # what upstream's build_optimizers accepts


def check_combinations(job_config: JobConfig, model_args: Any) -> None:
    """Check that keys fit together, independent of the machine.

    Args:
        job_config: config of the job; each value alone must be allowed.
        model_args: model args of its flavor.

    Raises:
        ConfigError: if keys do not fit together.
    """
    _check_unsupported(job_config)
    _check_profiling(job_config)
    _check_optimizer(job_config)
    _check_converters(job_config)
    _check_compile(job_config)
    _check_dataloaders(job_config)
    _check_context_parallel(job_config, model_args)
    _check_expert_backend(job_config, model_args)
    _check_load_balance(job_config, model_args)
    _check_pipeline(job_config, model_args)
    check_module_names(job_config)


def _check_unsupported(job_config: JobConfig) -> None:
    """Check that keys which the trainer does not support are off."""
    if job_config.fault_tolerance.enable:
        raise ConfigError(
            "fault_tolerance.enable",
            True,
            "must be false: only TorchTitan's fault-tolerant trainer, experiments.ft, supports it, "
            "without superposition",
        )
    if job_config.memory_estimation.enable:
        raise ConfigError(
            "memory_estimation.enable",
            True,
            "must be false: no trainer reads it. Use `tst plan` to estimate the memory of a job",
        )
    if job_config.comm.mode == "local_tensor":
        raise ConfigError(
            "comm.mode",
            "local_tensor",
            "TorchTitan does not train in this mode; use fake_backend to try a job in one process",
        )
    if module := job_config.experimental.custom_args_module:
        raise ConfigError(
            "experimental.custom_args_module", module, "must be empty: use job.custom_config_module"
        )
    spec = train_spec_module.get_train_spec(job_config.model.name)
    if job_config.validation.enable and spec.build_validator_fn is None:
        raise ConfigError(
            "validation.enable",
            True,
            f"must be false: model.name = {job_config.model.name!r} has no validation",
        )


def _check_profiling(job_config: JobConfig) -> None:
    """Check that a profiling cycle fits into ``profile_freq`` steps."""
    profiling = job_config.profiling
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < cycle:
        raise ConfigError(
            "profiling.profile_freq",
            profiling.profile_freq,
            f"must be at least {cycle} steps, profiling.profiler_warmup + profiler_active",
        )


def _check_optimizer(job_config: JobConfig) -> None:
    """Check the optimizer, and the length of the learning-rate schedule."""
    optimizer, layout = job_config.optimizer, job_config.parallelism
    spec = train_spec_module.get_train_spec(job_config.model.name)
    ours = spec.build_optimizers_fn in (build_optimizers, build_optimizers_with_moe_load_balancing)
    if ours and optimizer.name not in _OPTIMIZERS:
        raise ConfigError(
            "optimizer.name", optimizer.name, f"must be one of {', '.join(_OPTIMIZERS)}"
        )
    for kind in ("expert", "pipeline"):
        degree = getattr(layout, f"{kind}_parallel_degree")
        if optimizer.early_step_in_backward and degree > 1:
            raise ConfigError(
                "optimizer.early_step_in_backward",
                True,
                f"must be false with parallelism.{kind}_parallel_degree = {degree}",
            )
    total, steps = job_config.lr_scheduler.total_steps, job_config.training.steps
    if total is not None and total < steps:
        raise ConfigError(
            "lr_scheduler.total_steps",
            total,
            f"must be at least training.steps = {steps}; the learning rate would be negative after "
            "its end",
        )


def _check_converters(job_config: JobConfig) -> None:
    """Check that model converters are known, and fit each other and the parallelism."""
    names = job_config.model.converters
    for name in names:
        if name not in CONVERTERS:
            similar = [known for known in CONVERTERS if name and known.endswith(f".{name}")]
            hint = f" ({name!r} of an older TorchTitan is now {similar[0]!r})" if similar else ""
            raise ConfigError(
                "model.converters", names, f"must be a list of {', '.join(CONVERTERS)}{hint}"
            )
    precisions = {name.rpartition(".")[2] for name in names if name.startswith("quantize.")}
    if len(precisions) > 1:
        raise ConfigError(
            "model.converters", names, f"must all be of one kind: {' or '.join(sorted(precisions))}"
        )
    float8 = job_config.quantize.linear.float8
    gathers = float8.recipe_name and float8.enable_fsdp_float8_all_gather
    if "quantize.linear.float8" in names and gathers:
        raise ConfigError(
            "quantize.linear.float8.enable_fsdp_float8_all_gather",
            True,
            f"must be false with quantize.linear.float8.recipe_name = {float8.recipe_name!r}",
        )
    layout, key = job_config.parallelism, "quantize.grouped_mm.float8"
    for kind in ("pipeline", "context"):
        if key in names and (degree := getattr(layout, f"{kind}_parallel_degree")) > 1:
            raise ConfigError(
                "model.converters",
                names,
                f"{key} does not support parallelism.{kind}_parallel_degree = {degree}",
            )


def _check_compile(job_config: JobConfig) -> None:
    """Check keys that need torch.compile, and its backend."""
    layout, names = job_config.parallelism, job_config.model.converters
    compiled, tensor = compiles(job_config, "model"), layout.tensor_parallel_degree
    needs = 'needs compile.enable = true, with "model" in compile.components'
    if job_config.activation_checkpoint.mode == "memory_budget" and not compiled:
        raise ConfigError("activation_checkpoint.mode", "memory_budget", needs)
    if layout.enable_async_tensor_parallel and tensor > 1 and not compiled:
        raise ConfigError("parallelism.enable_async_tensor_parallel", True, needs)
    if "quantize.linear.mx" in names and compiled and tensor > 1:
        raise ConfigError(
            "model.converters",
            names,
            f"quantize.linear.mx does not support parallelism.tensor_parallel_degree = {tensor} "
            "with compile.enable = true",
        )
    backend = job_config.compile.backend
    known = not job_config.compile.enable or backend == "inductor"
    if not known and backend not in compile_backends(exclude=()):
        raise ConfigError(
            "compile.backend", backend, f"must be one of {', '.join(compile_backends())}"
        )


def _check_dataloaders(job_config: JobConfig) -> None:
    """Check that options of worker processes are used with workers only."""
    for section in ("training", "validation"):
        loader = getattr(job_config, section).dataloader
        for key, off in (("persistent_workers", False), ("prefetch_factor", None)):
            value = getattr(loader, key)
            if value != off and loader.num_workers == 0:
                raise ConfigError(
                    f"{section}.dataloader.{key}",
                    value,
                    f"needs {section}.dataloader.num_workers above 0",
                )


def _check_context_parallel(job_config: JobConfig, model_args: Any) -> None:
    """Check that the model's attention supports context parallelism and its load balancer."""
    layout, name = job_config.parallelism, job_config.model.name
    attention = getattr(model_args, "attn_type", "sdpa")
    if (degree := layout.context_parallel_degree) == 1:
        return
    able = {"llama3": ("sdpa", "flex"), "qwen3": ("sdpa",)}.get(name, (attention,))
    if attention not in able:
        raise ConfigError(
            "parallelism.context_parallel_degree",
            degree,
            f"must be 1 with model.flavor = {job_config.model.flavor!r}, which has {attention} "
            f"attention: TorchTitan's {name} supports it for {', '.join(able)}",
        )
    balancer = layout.context_parallel_load_balancer
    if balancer == "ptrr" and attention != "flex":
        raise ConfigError(
            "parallelism.context_parallel_load_balancer",
            balancer,
            f'needs flex attention; use "headtail" for {attention}, the attention of model.flavor '
            f"= {job_config.model.flavor!r}",
        )


def _check_expert_backend(job_config: JobConfig, model_args: Any) -> None:
    """Check that Qwen 3 is not asked for DeepEP, which upstream would silently ignore."""
    layout = job_config.parallelism
    if (
        layout.expert_parallel_comm_backend == "deepep"
        and layout.expert_parallel_degree > 1
        and getattr(model_args, "moe_enabled", False)
        and job_config.model.name == "qwen3"
    ):
        raise ConfigError(
            "parallelism.expert_parallel_comm_backend",
            "deepep",
            'must be "standard": TorchTitan\'s qwen3 does not support DeepEP',
        )


def _check_load_balance(job_config: JobConfig, model_args: Any) -> None:
    """Check that the model has experts that ``[load_balance]`` can balance."""
    method = load_balance_section(job_config).method
    if method == "upstream":
        return
    name, flavor = job_config.model.name, job_config.model.flavor
    why = ""
    if not has_experts(model_args):
        why = f"{name} {flavor} has no experts"
    elif train_spec_module.get_train_spec(name).build_optimizers_fn not in (
        build_optimizers,
        build_optimizers_with_moe_load_balancing,
    ):
        why = f"{name} has its own build_optimizers_fn"
    if why:
        raise ConfigError("load_balance.method", method, f'must be "upstream": {why}')


def _check_pipeline(job_config: JobConfig, model_args: Any) -> None:
    """Check that the pipeline's schedule exists and fits the rest of the job."""
    layout, mode = job_config.parallelism, job_config.comm.mode
    if mode == "fake_backend" and (degree := layout.pipeline_parallel_degree) > 1:
        raise ConfigError(
            "comm.mode",
            mode,
            "does not support pipeline parallelism (parallelism.pipeline_parallel_degree = "
            f"{degree}); use `tst dry-run`",
        )
    try:
        schedule = get_schedule_class(layout.pipeline_parallel_schedule)
    except ValueError as error:
        raise ConfigError(
            "parallelism.pipeline_parallel_schedule", layout.pipeline_parallel_schedule, f"{error}"
        ) from None
    csv = layout.pipeline_parallel_schedule_csv
    if csv and layout.pipeline_parallel_degree > 1 and not Path(csv).is_file():
        raise ConfigError("parallelism.pipeline_parallel_schedule_csv", csv, "no such file")
    spec = train_spec_module.get_train_spec(job_config.model.name)
    if layout.pipeline_parallel_degree == 1 or spec.pipelining_fn is not pipeline_llm:
        return
    overlaps = layout.pipeline_parallel_expert_parallel_overlap and schedule is ScheduleDualPipeV
    overlaps = overlaps and layout.expert_parallel_degree > 1
    method = load_balance_section(job_config).method
    if overlaps and method == "auxiliary_loss":
        raise ConfigError(
            "load_balance.method",
            method,
            "does not work with the schedule DualPipeV, which runs forward and backward at once; "
            "set another, or parallelism.pipeline_parallel_expert_parallel_overlap = false",
        )
    checkpointing = job_config.activation_checkpoint.mode
    if overlaps and checkpointing != "none":
        raise ConfigError(
            "activation_checkpoint.mode",
            checkpointing,
            'must be "none" with the schedule DualPipeV and expert parallelism; or set '
            "parallelism.pipeline_parallel_expert_parallel_overlap = false",
        )
    if not hasattr(model_args, "n_layers"):
        raise ConfigError(
            "parallelism.pipeline_parallel_degree",
            layout.pipeline_parallel_degree,
            f"must be 1: the model args of model.name = {job_config.model.name!r} have no "
            "n_layers, and TorchTitan cuts a model into stages by it",
        )
    _check_stages(job_config, schedule, model_args.n_layers)


def _check_stages(job_config: JobConfig, schedule: type, layers: int) -> None:
    """Check that each rank has as many stages as the schedule needs, and each stage a layer."""
    layout = job_config.parallelism
    degree, by_hand = layout.pipeline_parallel_degree, layout.module_fqns_per_model_part
    first = layout.pipeline_parallel_first_stage_less_layers
    last = layout.pipeline_parallel_last_stage_less_layers
    single = issubclass(schedule, PipelineScheduleSingle)
    key, value, stages = "pipeline_parallel_degree", degree, degree if single else 2 * degree
    if layout.pipeline_parallel_layers_per_stage is not None:
        key, value = "pipeline_parallel_layers_per_stage", layout.pipeline_parallel_layers_per_stage
        stages = math.ceil((layers + first + last) / value)
    elif by_hand is not None:
        key, value, stages = "module_fqns_per_model_part", by_hand, len(by_hand)
    per_rank = stages / degree
    if schedule is PipelineScheduleRuntime or layout.pipeline_parallel_schedule_csv:
        fits, wanted = True, "equally many stages"
    elif single:
        fits, wanted = per_rank == 1, "1 stage"
    elif schedule in (ScheduleZBVZeroBubble, ScheduleDualPipeV):
        fits, wanted = per_rank == 2, "2 stages"
    else:
        fits, wanted = per_rank >= 2, "at least 2 stages"
    if not fits or stages % degree:
        raise ConfigError(
            f"parallelism.{key}",
            value,
            f"makes {stages} stages on {degree} ranks of the pipeline, but parallelism."
            f"pipeline_parallel_schedule = {layout.pipeline_parallel_schedule!r} needs {wanted} on "
            "each",
        )
    if by_hand is None:
        try:
            generate_llm_fqn_per_model_part(stages, layers, first, last)
        except ValueError as error:
            raise ConfigError(
                f"parallelism.{key}", value, f"makes {stages} stages of {layers} layers: {error}"
            ) from None
