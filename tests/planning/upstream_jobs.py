"""What TorchTitan 0.2.2 publishes for Llama 3 and Qwen 3: its configs, and its integration tests.

The values that matter for a plan, under names of our own; tokenizer and data are left out.
"""

from typing import NamedTuple


class UpstreamJob(NamedTuple):
    """Arguments of a job, and the ranks that it is for."""

    args: tuple[str, ...]
    ranks: int


def _job(ranks: int, **values: object) -> UpstreamJob:
    """``section__key=value``; True and False for switches."""
    args = []
    for name, value in values.items():
        section, _, key = name.rpartition("__")
        section = section.replace("__", ".")
        if isinstance(value, bool):
            args.append(f"--{section}.{key if value else f'no-{key}'}")
        else:
            args.append(f"--{section}.{key}={value}")
    return UpstreamJob(tuple(args), ranks)


def _config(ranks: int, name: str, flavor: str, batch: int, length: int, **others: object):
    values: dict[str, object] = {
        "model__name": name,
        "model__flavor": flavor,
        "training__local_batch_size": batch,
        "training__seq_len": length,
        "checkpoint__interval": 500,
        "activation_checkpoint__selective_ac_option": "op",
    }
    return _job(ranks, **(values | others))


_PROFILED = {
    "profiling__enable_profiling": True,
    "profiling__profile_freq": 100,
    "metrics__enable_tensorboard": True,
}
_VALIDATED = {"validation__dataset": "c4_validation", "validation__freq": 500}
_FULL = {"activation_checkpoint__mode": "full"}
_HALF = {"checkpoint__export_dtype": "float16", "checkpoint__last_save_model_only": False}
_FLOAT8 = {
    "model__converters": "quantize.linear.float8",
    "quantize__linear__float8__enable_fsdp_float8_all_gather": True,
    "quantize__linear__float8__precompute_float8_dynamic_scale_for_fsdp": True,
    "quantize__linear__float8__filter_fqns": "output",
}
_COMPILED = {"compile__enable": True}

CONFIGS: dict[str, UpstreamJob] = {
    "llama3 8B": _config(
        64, "llama3", "8B", 1, 8192, lr_scheduler__warmup_steps=200, **_PROFILED, **_VALIDATED
    ),
    "llama3 70B": _config(
        256, "llama3", "70B", 8, 8192, parallelism__tensor_parallel_degree=8, **_FULL, **_PROFILED
    ),
    "llama3 405B": _config(
        *(512, "llama3", "405B", 2, 8192),
        parallelism__tensor_parallel_degree=8,
        parallelism__enable_async_tensor_parallel=True,
        **_FULL,
        **_FLOAT8,
        **_COMPILED,
        **_PROFILED,
    ),
    "qwen3 0.6B": _config(8, "qwen3", "0.6B", 4, 4096, training__steps=10, **_HALF),
    "qwen3 1.7B": _config(8, "qwen3", "1.7B", 4, 4096, training__steps=100, **_HALF),
    "qwen3 32B": _config(8, "qwen3", "32B", 2, 4096, training__steps=3000, **_FULL, **_HALF),
    "qwen3 moe debug": _config(8, "qwen3", "debugmodel_moe", 4, 4096, training__steps=10, **_HALF),
}

_PP = "parallelism__pipeline_parallel_"
_TP2 = {"parallelism__tensor_parallel_degree": 2}
_CP2 = {"parallelism__context_parallel_degree": 2}


def _shard(degree: int, replicate: int = 1) -> dict[str, object]:
    return {
        "parallelism__data_parallel_shard_degree": degree,
        "parallelism__data_parallel_replicate_degree": replicate,
    }


def _pipeline(degree: int, schedule: str = "1F1B", **others: object) -> dict[str, object]:
    given = {f"{_PP}{key}": value for key, value in others.items()}
    return {f"{_PP}degree": degree, f"{_PP}schedule": schedule} | given


def _debug(ranks: int, *values: dict[str, object], **others: object) -> UpstreamJob:
    """On upstream's config for debugging."""
    base: dict[str, object] = {
        "training__steps": 10,
        "training__dataset": "c4_test",
        "lr_scheduler__warmup_steps": 2,
        "lr_scheduler__decay_ratio": 0.8,
        "checkpoint__interval": 10,
    }
    for some in values:
        base |= some
    return _job(ranks, **(base | others))


_OP = {"activation_checkpoint__selective_ac_option": "op"}
_FLEX = {"model__flavor": "debugmodel_flex_attn"}
_VARLEN = {"model__flavor": "debugmodel_varlen_attn"}
_QWEN3 = {"model__name": "qwen3", "model__flavor": "debugmodel"}
_QWEN3_MOE = {"model__name": "qwen3", "model__flavor": "debugmodel_moe"}
_OFFLOADED = {"training__enable_cpu_offload": True, "optimizer__early_step_in_backward": True}
_EXPERTS = "parallelism__expert_"

INTEGRATION_TESTS: dict[str, UpstreamJob] = {
    "default": _debug(4, profiling__enable_profiling=True, metrics__enable_tensorboard=True),
    "compile": _debug(4, _COMPILED),
    "compile, selective op": _debug(4, _COMPILED, _OP),
    "TP": _debug(4, _TP2),
    "TP, compile": _debug(4, _TP2, _COMPILED),
    "async TP": _debug(4, _TP2, _COMPILED, parallelism__enable_async_tensor_parallel=True),
    "checkpoint": _debug(4, checkpoint__enable=True),
    "checkpoint in Hugging Face format": _debug(
        *(4, {"checkpoint__last_save_in_hf": True}),
        checkpoint__enable=True,
        checkpoint__last_save_model_only=True,
    ),
    "checkpoint in bfloat16": _debug(
        4, checkpoint__enable=True, checkpoint__export_dtype="bfloat16"
    ),
    "zero bubble": _debug(4, _pipeline(4, "InterleavedZeroBubble")),
    "zero bubble in a V": _debug(2, _pipeline(2, "ZBVZeroBubble")),
    "PP": _debug(2, _pipeline(2), _shard(1)),
    "PP, GPipe": _debug(2, _pipeline(2, "GPipe"), _shard(1)),
    "PP, FSDP": _debug(4, _pipeline(2), _shard(2)),
    "PP, layers per stage": _debug(4, _pipeline(2, layers_per_stage=4), _shard(2)),
    "PP, TP": _debug(4, _pipeline(2), _TP2),
    "PP, FSDP, TP": _debug(8, _pipeline(2), _shard(2), _TP2, checkpoint__enable=True),
    "PP, FSDP, TP, compile": _debug(8, _pipeline(2), _shard(2), _TP2, _COMPILED),
    "looped PP": _debug(4, _pipeline(4, "Interleaved1F1B")),
    "looped PP, layers per stage": _debug(4, _pipeline(4, "Interleaved1F1B", layers_per_stage=1)),
    "foreach": _debug(2, optimizer__name="AdamW", optimizer__implementation="foreach"),
    "DDP": _debug(4, _shard(1, 4)),
    "HSDP": _debug(4, _shard(2, 2)),
    "flex, full": _debug(4, _shard(4), _FLEX, _FULL),
    "flex, selective op": _debug(4, _shard(4), _FLEX, _OP),
    "varlen, selective op": _debug(4, _shard(4), _VARLEN, _OP),
    "CP": _debug(4, parallelism__context_parallel_degree=4),
    "CP, alltoall": _debug(
        *(4, {"parallelism__context_parallel_rotate_method": "alltoall"}),
        parallelism__context_parallel_degree=4,
    ),
    "HSDP, TP": _debug(8, _shard(2, 2), _TP2),
    "FSDP, CP": _debug(4, _shard(2), _CP2),
    "HSDP, CP without FSDP": _debug(4, _shard(1, 2), _CP2),
    "HSDP, CP": _debug(8, _shard(2, 2), _CP2),
    "FSDP, TP, CP": _debug(8, _shard(2), _TP2, _CP2),
    "offload": _debug(8, _TP2, _CP2, _OFFLOADED, checkpoint__enable=True),
    "offload, HSDP": _debug(8, _shard(-1, 2), _TP2, _CP2, _OFFLOADED),
    "always reshard": _debug(2, parallelism__fsdp_reshard_after_forward="always"),
    "excluded from loading": _debug(
        *(4, _TP2),
        checkpoint__enable=True,
        checkpoint__exclude_from_loading="lr_scheduler,dataloader,optimizer",
    ),
    "float8 emulated": _debug(4, _FLOAT8, quantize__linear__float8__emulate=True),
    "gradient accumulation": _debug(2, training__global_batch_size=32),
    "validation, TP, CP, PP": _debug(
        *(8, _TP2, _CP2, _pipeline(2, "Interleaved1F1B")),
        validation__enable=True,
        validation__dataset="c4_test",
    ),
    "float8": _debug(4, _FLOAT8, _COMPILED),
    "float8, async TP, PP": _debug(
        *(8, _FLOAT8, _COMPILED, _shard(2), _TP2, _pipeline(2)),
        parallelism__enable_async_tensor_parallel=True,
    ),
    "float8, HSDP, CP": _debug(8, _FLOAT8, _COMPILED, _shard(2, 2), _CP2),
    "MX": _debug(4, _COMPILED, model__converters="quantize.linear.mx"),
    "qwen3, FSDP, TP": _debug(4, _QWEN3, _shard(2), _TP2),
    "qwen3, FSDP, TP, CP": _debug(8, _QWEN3, _shard(2), _TP2, _CP2),
    "qwen3 MoE, FSDP, TP, EP": _debug(
        4, _QWEN3_MOE, _shard(2), _TP2, **{f"{_EXPERTS}parallel_degree": 4}
    ),
    "qwen3 MoE, FSDP, TP, EP, ETP": _debug(
        *(4, _QWEN3_MOE, _shard(2), _TP2),
        **{f"{_EXPERTS}parallel_degree": 2, f"{_EXPERTS}tensor_parallel_degree": 2},
    ),
    "qwen3 MoE, CP, EP": _debug(
        4, _QWEN3_MOE, _shard(2), _CP2, **{f"{_EXPERTS}parallel_degree": 2}
    ),
    "float8 experts": _debug(
        *(4, _QWEN3_MOE, _COMPILED),
        model__converters="quantize.linear.float8,quantize.grouped_mm.float8",
        quantize__grouped_mm__float8__fqns="experts",
    ),
}
