"""Jobs of TorchTitan 0.2.2: its published configs, and what its integration tests run.

Each has the keys that change layout, batch, or memory, and neither data nor a tokenizer.
"""

from typing import NamedTuple

import torch


class Job(NamedTuple):
    """One job.

    Attributes:
        ranks: GPUs that TorchTitan runs it on.
        args: of the command line.
        reason: a part of the line that says why its memory is not estimated; "" if it is.
    """

    ranks: int
    args: tuple[str, ...]
    reason: str = ""


OFFLOAD = "enable_cpu_offload"
# Embedding and LM head: torch 2.13 refuses to shard them as upstream's Qwen 3 asks it to.
TIED = "is shared with" if torch.__version__ >= "2.13" else ""
SCHEDULE = "SCHEDULE"  # for the path of a schedule of two stages on each of two ranks


def _job(ranks: int, text: str, reason: str = "") -> Job:
    """A job of keys without their section, such as "tp=2 mode=full"."""
    return Job(ranks, tuple(map(_argument, text.split())), reason)


def _argument(pair: str) -> str:
    name, equals, value = pair.partition("=")
    return f"--{_KEYS.get(name, name)}{equals}{value}"


_KEYS = {
    "model": "model.name",
    "flavor": "model.flavor",
    "converters": "model.converters",
    "batch": "training.local_batch_size",
    "sequence": "training.seq_len",
    "steps": "training.steps",
    "offload": "training.enable_cpu_offload",
    "ac": "activation_checkpoint.mode",
    "ac_option": "activation_checkpoint.selective_ac_option",
    "compile": "compile.enable",
    "profile": "profiling.enable_profiling",
    "tensorboard": "metrics.enable_tensorboard",
    "checkpoint": "checkpoint.enable",
    "warmup": "lr_scheduler.warmup_steps",
    "in_backward": "optimizer.early_step_in_backward",
    "gather_float8": "quantize.linear.float8.enable_fsdp_float8_all_gather",
    "precompute": "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
    "filter": "quantize.linear.float8.filter_fqns",
    "emulate": "quantize.linear.float8.emulate",
    "rotate": "parallelism.context_parallel_rotate_method",
    "schedule": "parallelism.pipeline_parallel_schedule",
    "csv": "parallelism.pipeline_parallel_schedule_csv",
    "layers": "parallelism.pipeline_parallel_layers_per_stage",
    "async_tp": "parallelism.enable_async_tensor_parallel",
    "reshard": "parallelism.fsdp_reshard_after_forward",
    "shard": "parallelism.data_parallel_shard_degree",
    "replicate": "parallelism.data_parallel_replicate_degree",
    "etp": "parallelism.expert_tensor_parallel_degree",
    **{
        f"{kind[0]}p": f"parallelism.{kind}_parallel_degree"
        for kind in ("tensor", "pipeline", "context", "expert")
    },
}

_FLOAT8 = "converters=quantize.linear.float8 gather_float8 precompute filter=output"
_DEBUG = "batch=8 sequence=2048 steps=10 warmup=2"  # of the tests' base config
_LLAMA = f"model=llama3 flavor=debugmodel {_DEBUG}"
_QWEN = f"model=qwen3 flavor=debugmodel {_DEBUG}"
_MOE = f"model=qwen3 flavor=debugmodel_moe {_DEBUG}"
_DEEPSEEK = f"model=deepseek_v3 flavor=debugmodel {_DEBUG}"
_LONG = "sequence=8192 profile tensorboard"  # of the published configs of Llama 3
_LOOPED = "pp=2 schedule=Interleaved1F1B shard=2 tp=2"

PUBLISHED = {  # models/*/train_configs, on the GPUs that they are presets for
    "llama3 debug_model": _job(4, _LLAMA),
    "llama3_8b": _job(64, f"model=llama3 flavor=8B batch=1 steps=1000 {_LONG} ac_option=op"),
    "llama3_70b": _job(64, f"model=llama3 flavor=70B batch=8 steps=1000 {_LONG} tp=8 ac=full"),
    "llama3_405b": _job(
        128,
        f"model=llama3 flavor=405B batch=2 steps=3000 {_LONG} tp=8 ac=full async_tp compile "
        f"{_FLOAT8}",
    ),
    "qwen3_0.6b": _job(
        8, "model=qwen3 flavor=0.6B batch=4 sequence=4096 steps=10 warmup=2 ac_option=op", TIED
    ),
    "qwen3_1.7b": _job(
        8, "model=qwen3 flavor=1.7B batch=4 sequence=4096 steps=100 warmup=20 ac_option=op", TIED
    ),
    "qwen3_32b": _job(8, "model=qwen3 flavor=32B batch=2 sequence=4096 steps=3000 ac=full"),
    "qwen3_moe_debug": _job(
        4, "model=qwen3 flavor=debugmodel_moe batch=4 sequence=4096 steps=10 warmup=2 ac_option=op"
    ),
}

INTEGRATION = {  # tests/integration_tests: features.py, models.py and h100.py
    "default": _job(4, f"{_LLAMA} profile tensorboard"),
    "1d_compile": _job(4, f"{_LLAMA} compile"),
    "1d_compile_sac_op": _job(4, f"{_LLAMA} compile ac=selective ac_option=op"),
    "2d_eager": _job(4, f"{_LLAMA} tp=2"),
    "2d_compile": _job(4, f"{_LLAMA} tp=2 compile"),
    "2d_asynctp_compile": _job(4, f"{_LLAMA} tp=2 compile async_tp"),
    "full_checkpoint": _job(4, f"{_LLAMA} checkpoint"),
    "model_only_hf_checkpoint": _job(
        4, f"{_LLAMA} checkpoint checkpoint.last_save_model_only checkpoint.last_save_in_hf"
    ),
    "last_save_model_only_bf16": _job(
        4, f"{_LLAMA} checkpoint checkpoint.last_save_model_only checkpoint.export_dtype=bfloat16"
    ),
    "pp_looped_zero_bubble": _job(4, f"{_LLAMA} pp=4 schedule=InterleavedZeroBubble"),
    "pp_zbv": _job(2, f"{_LLAMA} pp=2 schedule=ZBVZeroBubble"),
    "pp_1f1b": _job(2, f"{_LLAMA} pp=2 schedule=1F1B shard=1"),
    "pp_gpipe": _job(2, f"{_LLAMA} pp=2 schedule=GPipe shard=1"),
    "pp_dp_1f1b": _job(4, f"{_LLAMA} pp=2 schedule=1F1B shard=2 layers=4"),
    "pp_dp_gpipe": _job(4, f"{_LLAMA} pp=2 schedule=GPipe shard=2"),
    "pp_tp": _job(4, f"{_LLAMA} pp=2 tp=2"),
    "pp_dp_tp": _job(8, f"{_LLAMA} pp=2 shard=2 tp=2 checkpoint"),
    "3d_compile": _job(8, f"{_LLAMA} pp=2 shard=2 tp=2 compile"),
    "pp_looped_1f1b": _job(4, f"{_LLAMA} pp=4 schedule=Interleaved1F1B layers=1"),
    "pp_custom_csv": _job(2, f"{_LLAMA} pp=2 schedule=PipelineScheduleMulti csv={SCHEDULE}"),
    "optimizer_foreach": _job(2, f"{_LLAMA} optimizer.implementation=foreach"),
    "ddp": _job(4, f"{_LLAMA} shard=1 replicate=4"),
    "hsdp": _job(4, f"{_LLAMA} shard=2 replicate=2"),
    "fsdp+flex_attn": _job(4, f"{_LLAMA} flavor=debugmodel_flex_attn shard=4 ac=full"),
    "fsdp+flex_attn+per_op_sac": _job(
        4, f"{_LLAMA} flavor=debugmodel_flex_attn shard=4 ac_option=op"
    ),
    "fsdp+varlen_attn+per_op_sac": _job(
        4, f"{_LLAMA} flavor=debugmodel_varlen_attn shard=4 ac_option=op"
    ),
    "cp_allgather": _job(4, f"{_LLAMA} cp=4 rotate=allgather"),
    "cp_alltoall": _job(4, f"{_LLAMA} cp=4 rotate=alltoall"),
    "hsdp+tp": _job(8, f"{_LLAMA} shard=2 replicate=2 tp=2"),
    "fsdp+cp": _job(4, f"{_LLAMA} shard=2 cp=2"),
    "hsdp+cp_without_dp_shard": _job(4, f"{_LLAMA} shard=1 replicate=2 cp=2"),
    "hsdp+cp_with_dp_shard": _job(8, f"{_LLAMA} shard=2 replicate=2 cp=2"),
    "fsdp+tp+cp": _job(8, f"{_LLAMA} shard=2 tp=2 cp=2"),
    "cpu_offload+opt_in_bwd+TP+DP+CP": _job(
        8, f"{_LLAMA} tp=2 cp=2 replicate=2 offload in_backward", OFFLOAD
    ),
    "fsdp_reshard_always": _job(2, f"{_LLAMA} reshard=always"),
    "optional_checkpoint": _job(
        4,
        f"{_LLAMA} checkpoint tp=2 "
        "checkpoint.exclude_from_loading=lr_scheduler,dataloader,optimizer",
    ),
    "gradient_accumulation": _job(2, f"{_LLAMA} training.global_batch_size=32"),
    "validation_tp_cp_pp": _job(
        8,
        f"{_LLAMA} validation.enable validation.dataset=c4_test validation.seq_len=2048 tp=2 cp=2 "
        "pp=2 schedule=Interleaved1F1B",
    ),
    "dataloader_kwargs": _job(
        2,
        f"{_LLAMA} training.dataloader.num_workers=2 training.dataloader.pin_memory "
        "training.dataloader.persistent_workers training.dataloader.prefetch_factor=4",
    ),
    "float8_emulation": _job(4, f"{_LLAMA} converters=quantize.linear.float8 emulate"),
    "qwen3_fsdp+tp": _job(4, f"{_QWEN} shard=2 tp=2"),
    "qwen3_fsdp+tp+ep+etp": _job(4, f"{_MOE} shard=2 tp=2 ep=2 etp=2"),
    "float8": _job(4, f"{_LLAMA} {_FLOAT8}"),
    "fsdp+tp+pp+compile+float8": _job(8, f"{_LLAMA} {_FLOAT8} compile shard=2 tp=2 pp=2 async_tp"),
    "hsdp+cp+compile+float8": _job(8, f"{_LLAMA} {_FLOAT8} compile shard=2 replicate=2 cp=2"),
}

OTHERS = {  # the same of other models, and their other attention
    "deepseek_v3": _job(4, f"{_DEEPSEEK} shard=4"),
    "deepseek_v3_flex": _job(4, f"{_DEEPSEEK} flavor=debugmodel_flex_attn ac_option=op"),
    "deepseek_v3_fsdp+ep+compile": _job(4, f"{_DEEPSEEK} shard=4 ep=2 compile"),
    "deepseek_v3_pp+fsdp+tp+ep": _job(8, f"{_DEEPSEEK} {_LOOPED} ep=4 etp=1"),
    "deepseek_v3_pp+fsdp+tp+ep+etp": _job(8, f"{_DEEPSEEK} {_LOOPED} ep=2 etp=2"),
    "pp_dualpipev": _job(4, f"{_DEEPSEEK} pp=2 ep=2 schedule=DualPipeV ac=none"),
    "llama4_irope": _job(4, f"model=llama4 flavor=debugmodel_irope {_DEBUG}"),
    "llama4_pp+fsdp+tp+ep+compile": _job(
        8, f"model=llama4 flavor=debugmodel {_DEBUG} {_LOOPED} ep=4 etp=1 compile"
    ),
    "gpt_oss": _job(4, f"model=gpt_oss flavor=debugmodel {_DEBUG}", "DynamicOutputShapeException"),
    "gpt_oss_fsdp+tp+ep+compile": _job(
        8,
        f"model=gpt_oss flavor=debugmodel {_DEBUG} shard=4 tp=2 ep=4 compile",
        "DynamicOutputShapeException",
    ),
}
