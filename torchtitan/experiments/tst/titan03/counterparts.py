"""Where each key of a job goes in the config of TorchTitan 0.3, or why it has no place there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchtitan.tools.logging import logger

from ..errors import ConfigTextError
from .job_config import JobConfig, keys_of
from .models import args_of

FLOAT8, FLOAT8_EXPERTS = "quantize.linear.float8", "quantize.grouped_mm.float8"
_OWN_EXTENSIONS = (
    "",
    "torchtitan.experiments.tst.extension",
    "torchtitan.experiments.tst.models",
    "torchtitan.experiments.tst.data.datasets",
)


def _same(section: str, names: str, to: str | None = None) -> dict[str, str]:
    """Return the places of keys that 0.3 has under the same name, in the section ``to``."""
    return {f"{section}.{name}": f"{to or section}.{name}" for name in names.split()}


# Keys whose values are copied, and their places.
COPIED: dict[str, str] = {
    "job.dump_folder": "dump_folder",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    "model.hf_assets_path": "hf_assets_path",
    **_same(
        "profiling",
        "enable_profiling save_traces_folder profile_freq profiler_active profiler_warmup "
        "enable_memory_snapshot save_memory_snapshot_folder",
        "profiler",
    ),
    **_same(
        "metrics",
        "log_freq enable_tensorboard disable_color_printing save_tb_folder save_for_all_ranks "
        "enable_wandb",
    ),
    **_same("lr_scheduler", "warmup_steps total_steps decay_ratio decay_type min_lr_factor"),
    **_same(
        "training",
        "local_batch_size global_batch_size seq_len max_norm steps enable_cpu_offload dtype "
        "mixed_precision_param mixed_precision_reduce gc_freq gc_debug",
    ),
    **_same(
        "parallelism",
        "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward "
        "tensor_parallel_degree pipeline_parallel_degree pipeline_parallel_first_stage_less_layers "
        "pipeline_parallel_last_stage_less_layers pipeline_parallel_layers_per_stage "
        "pipeline_parallel_schedule pipeline_parallel_schedule_csv "
        "pipeline_parallel_microbatch_size context_parallel_degree context_parallel_load_balancer "
        "expert_parallel_degree",
    ),
    **_same(
        "checkpoint",
        "enable folder interval initial_load_model_only initial_load_in_hf "
        "initial_load_in_hf_quantized last_save_model_only last_save_in_hf export_dtype async_mode "
        "keep_latest_k load_step exclude_from_loading enable_first_step_checkpoint "
        "create_seed_checkpoint load_only",
    ),
    **_same("compile", "enable components backend"),
    **_same(
        "comm",
        "init_timeout_seconds train_timeout_seconds trace_buf_size save_traces_folder "
        "save_traces_file_prefix",
    ),
    **_same("validation", "enable freq steps", "validator"),
    "validation.local_batch_size": "validator.batch_size",
    "validation.seq_len": "validator.length",
    **_same("debug", "seed deterministic deterministic_warn_only moe_force_load_balance"),
}

# Keys that a part of 0.3's config is built from, by job.py.
BUILT = frozenset(
    f"{section}.{name}"
    for section, names in {
        "job": "config_file description",
        "model": "name flavor tokenizer_path converters",
        "optimizer": "name lr beta1 beta2 eps weight_decay implementation",
        "training": "dataset dataset_path",
        "training.dataloader": "num_workers persistent_workers pin_memory prefetch_factor",
        "validation": "dataset dataset_path",
        "validation.dataloader": "num_workers persistent_workers pin_memory prefetch_factor",
        "parallelism": "enable_async_tensor_parallel module_fqns_per_model_part "
        "expert_parallel_comm_backend",
        "checkpoint": "initial_load_path",
        "activation_checkpoint": "mode selective_ac_option memory_budget preserve_rng_state "
        "per_op_sac_force_recompute_mm_shapes_by_fqns visualize_memory_budget_pareto "
        "determinism_check debug",
        FLOAT8: "filter_fqns emulate",
        "superposition": "bag_size step_ratio steps mode loss weighting scale "
        "checkpoint_each_stage stop_at_boundary",
        "token_shards": "paths weights at_end",
        "text_dataset": "text_key",
        "lm_head": "chunks",
        "load_balance": "method coefficient",
    }.items()
    for name in names.split()
)

# Keys without a counterpart that change no loss, and why.
NO_EFFECT = {
    "model.print_after_conversion": "0.3 does not print the model",
    "parallelism.disable_loss_parallel": "0.3 always computes the loss in parallel",
    "parallelism.context_parallel_rotate_method": "0.3 always gathers keys and values",
    "parallelism.pipeline_parallel_expert_parallel_overlap": "0.3 never overlaps the two",
    "checkpoint.enable_ft_dataloader_checkpoints": "it is for fault_tolerance only",
    "activation_checkpoint.early_stop": "0.3 never stops early",
    "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice": "it is for quantize.linear.mx only",
    "quantize.linear.mx.recipe_name": "it is for quantize.linear.mx only",
    "quantize.linear.mx.filter_fqns": "it is for quantize.linear.mx only",
    "quantize.grouped_mm.mx.recipe_name": "it is for quantize.grouped_mm.mx only",
    "quantize.grouped_mm.mx.fqns": "it is for quantize.grouped_mm.mx only",
    "memory_estimation.disable_fake_mode": "it is for memory_estimation only",
    "fault_tolerance.process_group": "it is for fault_tolerance only",
    "fault_tolerance.process_group_timeout_ms": "it is for fault_tolerance only",
    "fault_tolerance.replica_id": "it is for fault_tolerance only",
    "fault_tolerance.group_size": "it is for fault_tolerance only",
    "fault_tolerance.min_replica_size": "it is for fault_tolerance only",
    "fault_tolerance.semi_sync_method": "it is for fault_tolerance only",
    "resilience.allow_config_mismatch": "0.3 does not compare a checkpoint with the config",
}


@dataclass(frozen=True)
class Without:
    """A key without a counterpart.

    Attributes:
        use: what to use instead.
        matters: whether the key changes the run of a job.
    """

    use: str
    matters: Callable[[Any], bool]


def _masks_documents(job: Any) -> bool:
    """Return whether attention must find the documents in token shards."""
    args = args_of(job.model.name, job.model.flavor)
    shards = job.training.dataset.lower() == "token_shards"
    return shards and args["attn_mask_type"] != "causal"


def _float8(job: Any) -> bool:
    return FLOAT8 in job.model.converters


WITHOUT: dict[str, Without] = {
    "job.custom_config_module": Without(
        "remove it: its sections are for TorchTitan 0.2.2",
        lambda job: bool(job.job.custom_config_module),
    ),
    "experimental.custom_import": Without(
        "remove it, and write a config function of 0.3 for your own model or dataset",
        lambda job: job.experimental.custom_import not in _OWN_EXTENSIONS,
    ),
    "experimental.custom_args_module": Without(
        "remove it: its sections are for TorchTitan 0.2.2",
        lambda job: bool(job.experimental.custom_args_module),
    ),
    "model.flavor": Without(
        "use a flavor without _flex or _varlen: with token shards, 0.3 masks no documents",
        _masks_documents,
    ),
    "model.converters": Without(
        f"only {FLOAT8} and {FLOAT8_EXPERTS} have counterparts",
        lambda job: bool(set(job.model.converters) - {FLOAT8, FLOAT8_EXPERTS}),
    ),
    f"{FLOAT8}.recipe_name": Without(
        'use "rowwise" or "rowwise_with_gw_hp"',
        lambda job: _float8(job) and job.quantize.linear.float8.recipe_name in (None, "tensorwise"),
    ),
    f"{FLOAT8}.enable_fsdp_float8_all_gather": Without(
        "remove it, and use a rowwise recipe",
        lambda job: _float8(job) and job.quantize.linear.float8.enable_fsdp_float8_all_gather,
    ),
    f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp": Without(
        "remove it, and use a rowwise recipe",
        lambda job: (
            _float8(job) and job.quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp
        ),
    ),
    f"{FLOAT8_EXPERTS}.fqns": Without(
        'use ["experts"]: 0.3 converts the experts of all layers',
        lambda job: (
            FLOAT8_EXPERTS in job.model.converters
            and job.quantize.grouped_mm.float8.fqns not in (["experts"], "experts")
        ),
    ),
    "optimizer.early_step_in_backward": Without(
        "set it to false", lambda job: job.optimizer.early_step_in_backward
    ),
    "parallelism.expert_tensor_parallel_degree": Without(
        "use 1: 0.3 shares experts over expert-parallel ranks only",
        lambda job: job.parallelism.expert_tensor_parallel_degree > 1,
    ),
    "comm.mode": Without('use "default"', lambda job: job.comm.mode != "default"),
    "memory_estimation.enable": Without(
        "set it to false: no trainer reads it", lambda job: job.memory_estimation.enable
    ),
    "fault_tolerance.enable": Without(
        "set it to false: TorchTitan's experiments.torchft has a trainer of its own",
        lambda job: job.fault_tolerance.enable,
    ),
    "superposition.reinit_at_recovery": Without(
        "use an empty list: this ablation needs TorchTitan 0.2.2",
        lambda job: bool(job.superposition.reinit_at_recovery) and job.superposition.bag_size != 1,
    ),
    "resilience.skip_damaged": Without(
        "set it to false, and remove a damaged checkpoint by hand",
        lambda job: job.resilience.skip_damaged,
    ),
    "resilience.max_skipped_steps": Without(
        "use 0: 0.3 stops at a loss that is not finite",
        lambda job: job.resilience.max_skipped_steps > 0,
    ),
}


def check_counterparts(job: Any) -> None:
    """Check that all keys of a job which change the run have a counterpart; log the others.

    Raises:
        ConfigTextError: if some have none; names each with its value and what to use instead.
    """
    values, defaults = keys_of(job), keys_of(JobConfig())
    refused = [
        f"{key} = {values[key]!r} ({without.use})"
        for key, without in WITHOUT.items()
        if without.matters(job)
    ]
    if refused:
        keys = "this key has" if len(refused) == 1 else "these keys have"
        raise ConfigTextError(
            f"{', '.join(refused)}: {keys} no counterpart in TorchTitan 0.3; change the job as "
            "shown, or use TorchTitan 0.2.2"
        )
    for key, reason in NO_EFFECT.items():
        if values[key] != defaults[key]:
            logger.warning(f"{key} = {values[key]!r} has no effect on TorchTitan 0.3: {reason}")
