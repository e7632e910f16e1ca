"""Keys of TorchTitan before 0.2.2, and their new names."""

from collections.abc import Container, Mapping
from typing import NamedTuple

from ..errors import ConfigTextError


class NewPlace(NamedTuple):
    """The new name of a key.

    Attributes:
        key: new name; "" if there is none.
        note: what else is different.
    """

    key: str
    note: str = ""

    def __str__(self) -> str:
        place = f"now {self.key}" if self.key else "gone"
        return f"{place}: {self.note}" if self.note else place


_FLOAT8 = 'with model.converters = ["quantize.linear.float8"]'
_MX = 'with model.converters = ["quantize.linear.mx"]'
_DILOCO = "only TorchTitan's fault-tolerant trainer, experiments.ft, reads it"

OLD_KEYS: dict[str, NewPlace] = {
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes": NewPlace(
        "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns"
    ),
    "checkpoint.enable_checkpoint": NewPlace("checkpoint.enable"),
    "checkpoint.initial_load_model_weights_only": NewPlace("checkpoint.initial_load_model_only"),
    "checkpoint.interval_type": NewPlace("", "checkpoint.interval counts steps"),
    "checkpoint.last_save_model_weights_only": NewPlace("checkpoint.last_save_model_only"),
    "checkpoint.model_weights_only": NewPlace("checkpoint.last_save_model_only"),
    "experimental.context_parallel_degree": NewPlace("parallelism.context_parallel_degree"),
    "experimental.context_parallel_rotate_method": NewPlace(
        "parallelism.context_parallel_rotate_method"
    ),
    "experimental.custom_args_module": NewPlace("job.custom_config_module"),
    "experimental.custom_model_path": NewPlace("experimental.custom_import"),
    "experimental.enable_async_tensor_parallel": NewPlace(
        "parallelism.enable_async_tensor_parallel"
    ),
    "experimental.enable_compiled_autograd": NewPlace("", "remove it"),
    "experimental.pipeline_parallel_degree": NewPlace("parallelism.pipeline_parallel_degree"),
    "experimental.pipeline_parallel_microbatches": NewPlace(
        "parallelism.pipeline_parallel_microbatch_size",
        "sequences in a micro-batch, no longer the number of micro-batches",
    ),
    "experimental.pipeline_parallel_schedule": NewPlace("parallelism.pipeline_parallel_schedule"),
    "experimental.pipeline_parallel_schedule_csv": NewPlace(
        "parallelism.pipeline_parallel_schedule_csv"
    ),
    "experimental.pipeline_parallel_split_points": NewPlace(
        "parallelism.module_fqns_per_model_part", "the names of all modules of each part"
    ),
    "fault_tolerance.fragment_sync_delay": NewPlace("", _DILOCO),
    "fault_tolerance.fragment_update_alpha": NewPlace("", _DILOCO),
    "fault_tolerance.should_quantize": NewPlace("", _DILOCO),
    "fault_tolerance.sync_steps": NewPlace("", _DILOCO),
    "float8.emulate": NewPlace("quantize.linear.float8.emulate", _FLOAT8),
    "float8.enable_float8_linear": NewPlace(
        "model.converters", 'the list ["quantize.linear.float8"]'
    ),
    "float8.enable_fsdp_float8_all_gather": NewPlace(
        "quantize.linear.float8.enable_fsdp_float8_all_gather", _FLOAT8
    ),
    "float8.filter_fqns": NewPlace("quantize.linear.float8.filter_fqns", f"a list, {_FLOAT8}"),
    "float8.force_recompute_fp8_weight_in_bwd": NewPlace("", "remove it"),
    "float8.moe_fqns_prototype": NewPlace(
        "quantize.grouped_mm.float8.fqns",
        'a list, with model.converters = ["quantize.grouped_mm.float8"]',
    ),
    "float8.precompute_float8_dynamic_scale_for_fsdp": NewPlace(
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp", _FLOAT8
    ),
    "float8.recipe_name": NewPlace("quantize.linear.float8.recipe_name", _FLOAT8),
    "job.print_args": NewPlace("job.print_config"),
    "job.use_for_integration_test": NewPlace("", "remove it"),
    "lr_scheduler.lr_min": NewPlace("lr_scheduler.min_lr_factor"),
    "memory_estimation.enabled": NewPlace("", "`tst plan` estimates the memory"),
    "metrics.enable_color_printing": NewPlace(
        "metrics.disable_color_printing", "with the opposite value"
    ),
    "metrics.rank_0_only": NewPlace("metrics.save_for_all_ranks", "with the opposite value"),
    "model.attn_mask_type": NewPlace("model.flavor", 'such as "8B_flex" or "8B_varlen"'),
    "model.norm_type": NewPlace("", "remove it: each flavor has its norm"),
    "model.tokenizer_path": NewPlace("model.hf_assets_path", "a folder with tokenizer.json"),
    "model.use_flex_attn": NewPlace("model.flavor", 'such as "8B_flex"'),
    "mx.filter_fqns": NewPlace("quantize.linear.mx.filter_fqns", f"a list, {_MX}"),
    "mx.recipe_name": NewPlace("quantize.linear.mx.recipe_name", _MX),
    "mx.use_fp8_dim1_cast_triton_kernel": NewPlace(
        "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice", 'such as "triton"'
    ),
    "optimizer.fused": NewPlace("optimizer.implementation", '"fused", "foreach" or "for-loop"'),
    "parallelism.enable_compiled_autograd": NewPlace("", "remove it"),
    "parallelism.pipeline_parallel_microbatches": NewPlace(
        "parallelism.pipeline_parallel_microbatch_size",
        "sequences in a micro-batch, no longer the number of micro-batches",
    ),
    "parallelism.pipeline_parallel_split_points": NewPlace(
        "parallelism.module_fqns_per_model_part", "the names of all modules of each part"
    ),
    "training.batch_size": NewPlace("training.local_batch_size"),
    "training.compile": NewPlace("compile.enable"),
    "training.data_parallel_degree": NewPlace("parallelism.data_parallel_shard_degree"),
    "training.data_parallel_replicate_degree": NewPlace(
        "parallelism.data_parallel_replicate_degree"
    ),
    "training.data_parallel_shard_degree": NewPlace("parallelism.data_parallel_shard_degree"),
    "training.debug_moe_force_load_balance": NewPlace("debug.moe_force_load_balance"),
    "training.deterministic": NewPlace("debug.deterministic"),
    "training.enable_float8_linear": NewPlace(
        "model.converters", 'the list ["quantize.linear.float8"]'
    ),
    "training.fp8_linear": NewPlace("model.converters", 'the list ["quantize.linear.float8"]'),
    "training.seed": NewPlace("debug.seed"),
    "training.tensor_parallel_degree": NewPlace("parallelism.tensor_parallel_degree"),
    "training.warmup_steps": NewPlace("lr_scheduler.warmup_steps"),
    "validation.enabled": NewPlace("validation.enable"),
}

_DEPRECATED = ("model.tokenizer_path", "experimental.custom_args_module")  # 0.2.2 still has them


def old_keys_error(given: Mapping[str, object], known: Container[str]) -> ConfigTextError | None:
    """Return an error that names all keys of an older TorchTitan; None if there are none.

    Args:
        given: keys of the job and their values.
        known: keys that exist.
    """
    old = [key for key in given if key in OLD_KEYS and key not in known]
    if not old:
        return None
    old += [key for key in _DEPRECATED if key in given and key in known]
    places = ", ".join(f"{key} = {given[key]!r} ({OLD_KEYS[key]})" for key in old)
    what = "keys" if len(old) > 1 else "a key"
    return ConfigTextError(f"{places}: {what} of an older TorchTitan; rename or remove as shown")
