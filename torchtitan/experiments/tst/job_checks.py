"""What must fit together in a job, from config and files alone.

It runs before a process group or a device is touched.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig as UpstreamJobConfig

from .checkpoint.agreement import run_facts
from .checkpoint.checks import check_agreement, check_last_save, check_loading
from .config.combinations import check_combinations, import_extension
from .config.errors import ConfigError
from .config.machine import check_machine
from .config.values import check_values
from .core import Schedule
from .data.checks import check_data
from .data.tokenizer import tokenizer_builder
from .data.tokenizer_identity import entries
from .job_config import (
    Superposition,
    boundary_step,
    build_schedule,
    dp_degree,
    lm_head_section,
    ranks_of_layout,
    resilience_section,
    superposition_section,
)


def check_job(
    job_config: UpstreamJobConfig,
    ranks: int | None = None,
    *,
    machine: bool = True,
    files: bool = True,
) -> Path | None:
    """Check that the job can run.

    Args:
        job_config: of the job.
        ranks: processes that it is to run on; None for those of this launch.
        machine: whether this machine is one that it is to run on.
        files: whether its tokenizer, data, folders and checkpoints are here.

    Returns:
        The checkpoint that it loads, as :func:`.checkpoint.checks.check_loading` tells.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
        CheckpointError: if the config contradicts the checkpoint that the job would go on from.
    """
    ranks = ranks or _ranks(job_config)
    schedule = check_config(job_config, ranks)
    if machine:
        check_machine(job_config)
    if not files:
        return None
    tokenizer = _check_tokenizer(job_config)
    degree = dp_degree(job_config, ranks)
    mixture = check_data(job_config, schedule, tokenizer, degree)
    _check_folders(job_config)
    if checkpoint := check_loading(job_config):
        facts = run_facts(job_config, schedule, tokenizer, mixture, degree)
        check_agreement(job_config, facts, checkpoint)
    return checkpoint


def check_config(job_config: UpstreamJobConfig, ranks: int) -> Schedule:
    """Check what needs neither files nor this machine: the values, and how they fit together.

    Args:
        job_config: of the job.
        ranks: processes that it is to run on.

    Returns:
        The job's schedule.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    check_values(job_config)
    import_extension(job_config)
    check_combinations(job_config, model_args_of(job_config))
    section = superposition_section(job_config)
    if section.bag_size > 1:
        _check_steps(section, job_config.training.steps)
        _check_combinations(section)
    schedule = build_schedule(job_config)
    if schedule.enabled:
        _check_shapes(job_config, schedule)
    _check_lengths(job_config, schedule)
    _check_pipeline(job_config)
    _check_lm_head(job_config)
    if section.stop_at_boundary and not (schedule.enabled and job_config.checkpoint.enable):
        raise ConfigError(
            "superposition.stop_at_boundary",
            True,
            "needs superposition steps (bag_size, steps) and checkpoint.enable",
        )
    _check_ranks(job_config, ranks)
    _check_batch(job_config, dp_degree(job_config, ranks))
    _check_seed_checkpoint(job_config, ranks)
    _check_offload(job_config, ranks)
    check_last_save(job_config)
    skipped = resilience_section(job_config).max_skipped_steps
    if skipped and job_config.optimizer.early_step_in_backward:
        raise ConfigError(
            "resilience.max_skipped_steps",
            skipped,
            "must be 0 with optimizer.early_step_in_backward, whose steps cannot be held back",
        )
    return schedule


def _check_steps(section: Superposition, total_steps: int) -> None:
    ratio, steps = section.step_ratio, section.steps
    if ratio is not None and steps is not None:
        raise ConfigError(
            f"superposition.step_ratio = {ratio!r} and superposition.steps",
            steps,
            "give one of the two (on the command line, --superposition.step_ratio None unsets one)",
        )
    if ratio is None and steps is None:
        raise ConfigError(
            "superposition.bag_size",
            section.bag_size,
            "needs superposition.step_ratio in [0, 1) or superposition.steps < training.steps",
        )
    boundary = boundary_step(section, total_steps)
    if boundary >= total_steps:
        name = "steps" if steps is not None else "step_ratio"
        raise ConfigError(
            f"superposition.{name}",
            getattr(section, name),
            f"{boundary} superposition steps must be fewer than training.steps = {total_steps}",
        )


def _check_combinations(section: Superposition) -> None:
    if section.loss != "mce" and section.weighting != "uniform":
        raise ConfigError(
            "superposition.weighting",
            section.weighting,
            f'must be "uniform" with superposition.loss = {section.loss!r}: the bag is a set',
        )
    if section.mode == "output" and section.scale == "batch":
        raise ConfigError(
            "superposition.scale",
            section.scale,
            'must be "sequence" with superposition.mode = "output", which reads no extra data',
        )


def _check_shapes(job_config: UpstreamJobConfig, schedule: Schedule) -> None:
    training = job_config.training
    try:
        schedule.batch_shape(1, training.local_batch_size, training.seq_len)
    except ValueError as error:
        raise ConfigError(
            "training.seq_len",
            training.seq_len,
            f'{error}, superposition.bag_size, as superposition.scale = "batch" needs',
        ) from None
    if schedule.mode == "output" and schedule.bag_size > training.seq_len:
        raise ConfigError(
            "superposition.bag_size",
            schedule.bag_size,
            "the next s tokens do not fit into a sequence of "
            f"training.seq_len = {training.seq_len} tokens",
        )


def _check_lengths(job_config: UpstreamJobConfig, schedule: Schedule) -> None:
    """Sequences of both phases, and of validation, go into TorchTitan's model as it is laid out."""
    training, validation = job_config.training, job_config.validation
    layout = job_config.parallelism
    tensor, context = layout.tensor_parallel_degree, layout.context_parallel_degree
    divisor = 2 * tensor * context
    of_layout = (
        f"which must be a multiple of {divisor}: 2 * parallelism.tensor_parallel_degree = {tensor} "
        f"* parallelism.context_parallel_degree = {context}"
    )
    spec = train_spec_module.get_train_spec(job_config.model.name)
    module = getattr(spec.parallelize_fn, "__module__", "")
    in_parts, lengths = tensor * context > 1, []
    if in_parts:
        shape = schedule.batch_shape(1, training.local_batch_size, training.seq_len)
        lengths.append(shape.latents)
    if in_parts or module.startswith("torchtitan.models."):  # whose models ask for it always
        lengths.append(training.seq_len)
    for latents in lengths:
        if latents % divisor:
            raise ConfigError(
                "training.seq_len", training.seq_len, f"gives {latents} latents, {of_layout}"
            )
    if not validation.enable:
        return
    if validation.seq_len > training.seq_len:
        raise ConfigError(
            "validation.seq_len",
            validation.seq_len,
            f"must be at most training.seq_len = {training.seq_len} tokens: the model's length",
        )
    if in_parts and validation.seq_len % divisor:
        raise ConfigError(
            "validation.seq_len", validation.seq_len, f"is a number of tokens, {of_layout}"
        )


def _check_ranks(job_config: UpstreamJobConfig, ranks: int) -> None:
    layout = job_config.parallelism
    _check_experts(job_config)
    wanted, free = ranks_of_layout(job_config)
    if ranks % wanted if free else ranks != wanted:
        raise ConfigError(
            "parallelism.data_parallel_shard_degree",
            layout.data_parallel_shard_degree,
            f"with the other degrees makes {'a multiple of ' if free else ''}{wanted} ranks, and "
            f"there are {ranks}" + ("" if free else "; -1 takes as many as there are"),
        )


def _check_experts(job_config: UpstreamJobConfig) -> None:
    """Ranks that share experts are those that shard the other parameters."""
    layout, model_args = job_config.parallelism, model_args_of(job_config)
    degree, tensor = layout.expert_parallel_degree, layout.tensor_parallel_degree
    of_experts = layout.expert_tensor_parallel_degree
    if degree > 1 and of_experts not in (1, tensor):
        raise ConfigError(
            "parallelism.expert_tensor_parallel_degree",
            of_experts,
            f"must be 1 or parallelism.tensor_parallel_degree = {tensor}",
        )
    shards = layout.data_parallel_shard_degree * layout.context_parallel_degree * tensor
    if shards > 0 and shards % (degree * of_experts):
        raise ConfigError(
            "parallelism.expert_parallel_degree",
            degree,
            f"times expert_tensor_parallel_degree = {of_experts} must divide {shards}, "
            "parallelism.data_parallel_shard_degree x context_parallel_degree x "
            "tensor_parallel_degree",
        )
    has_experts = getattr(model_args, "moe_enabled", hasattr(model_args, "moe_args"))
    if has_experts and (experts := model_args.moe_args.num_experts) % degree:
        raise ConfigError(
            "parallelism.expert_parallel_degree",
            degree,
            f"must divide the {experts} experts of model.flavor = {job_config.model.flavor!r}",
        )


def _check_seed_checkpoint(job_config: UpstreamJobConfig, ranks: int) -> None:
    key = "checkpoint.create_seed_checkpoint"
    if not job_config.checkpoint.create_seed_checkpoint:
        return
    if not job_config.checkpoint.enable:
        raise ConfigError(key, True, "needs checkpoint.enable = true")
    if ranks > 1:
        raise ConfigError(key, True, f"needs 1 rank, not {ranks}")


def _check_offload(job_config: UpstreamJobConfig, ranks: int) -> None:
    layout, seed = job_config.parallelism, job_config.checkpoint.create_seed_checkpoint
    replicas = layout.data_parallel_replicate_degree * layout.tensor_parallel_degree
    shards = ranks // (replicas * layout.pipeline_parallel_degree)  # context parallel ones, too
    if job_config.training.enable_cpu_offload and shards == 1 and not seed:
        raise ConfigError(
            "training.enable_cpu_offload",
            True,
            "needs FSDP, parallelism.data_parallel_shard_degree above 1; without it there is none",
        )


def _check_batch(job_config: UpstreamJobConfig, dp_degree: int) -> None:
    training = job_config.training
    at_once = training.local_batch_size * dp_degree
    if training.global_batch_size > 0 and training.global_batch_size % at_once:
        raise ConfigError(
            "training.global_batch_size",
            training.global_batch_size,
            f"must be a multiple of {at_once}, training.local_batch_size = "
            f"{training.local_batch_size} on {dp_degree} data-parallel ranks",
        )


def _check_pipeline(job_config: UpstreamJobConfig) -> None:
    layout, batch_size = job_config.parallelism, job_config.training.local_batch_size
    if (degree := layout.pipeline_parallel_degree) <= 1:
        return
    spec = train_spec_module.get_train_spec(job_config.model.name)
    if spec.pipelining_fn is None:
        raise ConfigError(
            "parallelism.pipeline_parallel_degree",
            degree,
            f"must be 1: TorchTitan has no pipeline of model.name = {job_config.model.name!r}",
        )
    size = layout.pipeline_parallel_microbatch_size
    if batch_size % size:
        raise ConfigError(
            "parallelism.pipeline_parallel_microbatch_size",
            size,
            f"must divide training.local_batch_size = {batch_size}",
        )
    microbatches, validation = batch_size // size, job_config.validation
    if validation.enable and validation.local_batch_size % microbatches:
        raise ConfigError(
            "validation.local_batch_size",
            validation.local_batch_size,
            f"must be a multiple of {microbatches}, the pipeline's microbatches of "
            f"training.local_batch_size = {batch_size}",
        )


def _check_lm_head(job_config: UpstreamJobConfig) -> None:
    chunks = lm_head_section(job_config).chunks
    if chunks == 1:
        return
    if (degree := job_config.parallelism.pipeline_parallel_degree) > 1:
        raise ConfigError(
            "lm_head.chunks",
            chunks,
            f"must be 1 with parallelism.pipeline_parallel_degree = {degree}, whose microbatches "
            "cut the logits: parallelism.pipeline_parallel_microbatch_size",
        )
    for name in job_config.model.converters:
        kind, _, precision = name.rpartition(".")
        if kind == "quantize.linear":
            kept = getattr(job_config.quantize.linear, precision).filter_fqns
            if not any(part in "output" for part in kept):
                raise ConfigError(
                    "lm_head.chunks",
                    chunks,
                    f'must be 1 where the LM head is quantized; "output" in {name}.filter_fqns '
                    "leaves it alone",
                )


def model_args_of(job_config: UpstreamJobConfig) -> Any:
    """Of the flavor.

    Raises:
        ConfigError: if there is no such model or flavor.
    """
    name, flavor = job_config.model.name, job_config.model.flavor
    try:
        flavors = train_spec_module.get_train_spec(name).model_args
    except ValueError as error:
        raise ConfigError("model.name", name, str(error)) from None
    if flavor not in flavors:
        raise ConfigError("model.flavor", flavor, f"{name} has {', '.join(flavors)}")
    return flavors[flavor]


def _check_tokenizer(job_config: UpstreamJobConfig) -> BaseTokenizer | None:
    path, model_args = job_config.model.hf_assets_path, model_args_of(job_config)
    spec = train_spec_module.get_train_spec(job_config.model.name)
    build = tokenizer_builder(spec.build_tokenizer_fn)
    if build is None:
        return None
    try:
        tokenizer = build(job_config)
    except FileNotFoundError as error:
        raise ConfigError("model.hf_assets_path", path, str(error)) from None
    if (count := entries(tokenizer)) > model_args.vocab_size:
        raise ConfigError(
            "model.hf_assets_path",
            path,
            f"its tokenizer has {count:,} "
            f"entries, more than the {model_args.vocab_size:,} of model.flavor = "
            f"{job_config.model.flavor!r}",
        )
    _check_documents_end(job_config, tokenizer)
    return tokenizer


def _check_documents_end(job_config: UpstreamJobConfig, tokenizer: BaseTokenizer) -> None:
    """Attention within documents finds them by their EOS token."""
    model_args = model_args_of(job_config)
    masks = getattr(model_args, "attn_type", "sdpa") in ("flex", "varlen")  # as upstream's trainer
    within = masks and getattr(model_args, "attn_mask_type", "causal") == "block_causal"
    if within and getattr(tokenizer, "eos_id", None) is None:
        raise ConfigError(
            "model.flavor",
            job_config.model.flavor,
            f'its attention ({model_args.attn_type}, attn_mask_type = "block_causal") finds the '
            "ends of documents by the EOS token, and the tokenizer in model.hf_assets_path = "
            f"{job_config.model.hf_assets_path!r} has none; set eos_token in its "
            "tokenizer_config.json, or take a flavor without such attention",
        )


def _check_folders(job_config: UpstreamJobConfig) -> None:
    """Files can be made where the run will want to make them."""
    dump_folder = Path(job_config.job.dump_folder)
    places = {"job.dump_folder": dump_folder}
    if job_config.checkpoint.enable and not job_config.checkpoint.load_only:
        places["checkpoint.folder"] = dump_folder / job_config.checkpoint.folder
    for key, folder in places.items():
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise ConfigError(
                key, str(folder), f"cannot write to {existing}: {error.strerror}"
            ) from None


def _ranks(job_config: UpstreamJobConfig) -> int:
    """Processes of this launch."""
    name = "WORLD_SIZE" if job_config.comm.mode == "default" else "NGPU"
    return int(os.environ.get(name, "1"))
