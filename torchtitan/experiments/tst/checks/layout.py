"""Check the layout of a job: its degrees of parallelism must fit ranks, lengths and batches."""

import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.config import JobConfig

from ..config.job_config import lm_head_section
from ..core import Schedule
from ..errors import ConfigError
from .model import model_args_of
from .ranks import check_ranks


def check_layout(job_config: JobConfig, schedule: Schedule, ranks: int) -> None:
    """Check that the degrees of a job fit ``ranks`` processes and the rest of the job.

    Raises:
        ConfigError: if they do not fit.
    """
    _check_lengths(job_config, schedule)
    _check_pipeline(job_config)
    _check_lm_head(job_config)
    _check_experts(job_config)
    check_ranks(job_config, ranks)


def _check_lengths(job_config: JobConfig, schedule: Schedule) -> None:
    """Check the sequence lengths of every stage, of recovery and of validation."""
    training, validation = job_config.training, job_config.validation
    layout = job_config.parallelism
    tensor, context = layout.tensor_parallel_degree, layout.context_parallel_degree
    divisor = 2 * tensor * context
    multiple = (
        f"must be a multiple of {divisor}: 2 * parallelism.tensor_parallel_degree = {tensor} "
        f"* parallelism.context_parallel_degree = {context}"
    )
    spec = train_spec_module.get_train_spec(job_config.model.name)
    module = getattr(spec.parallelize_fn, "__module__", "")
    in_parts = tensor * context > 1
    lengths: dict[int, str] = {}  # length in latents -> its stage, if there are several
    if in_parts:
        for stage in schedule.stages:
            shape = schedule.batch_shape(stage.first, training.local_batch_size, training.seq_len)
            of_stage = f" in bags of {stage.bag_size}" if len(schedule.stages) > 1 else ""
            lengths.setdefault(shape.latents, of_stage)
    if in_parts or module.startswith("torchtitan.models."):  # these models always check it
        lengths.setdefault(training.seq_len, "")
    for latents, of_stage in lengths.items():
        if latents % divisor:
            raise ConfigError(
                "training.seq_len",
                training.seq_len,
                f"gives {latents} latents{of_stage}, which {multiple}",
            )
    if not validation.enable:
        return
    if validation.seq_len > training.seq_len:
        raise ConfigError(
            "validation.seq_len",
            validation.seq_len,
            f"must be at most training.seq_len = {training.seq_len}, the model's sequence length",
        )
    if in_parts and validation.seq_len % divisor:
        raise ConfigError("validation.seq_len", validation.seq_len, multiple)


def _check_experts(job_config: JobConfig) -> None:
    """Check that the ranks which share experts are the ranks which shard other parameters."""
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
            f"times expert_tensor_parallel_degree = {of_experts} must divide {shards}, the product "
            "of parallelism.data_parallel_shard_degree, context_parallel_degree and "
            "tensor_parallel_degree",
        )
    has_experts = getattr(model_args, "moe_enabled", hasattr(model_args, "moe_args"))
    if has_experts and (experts := model_args.moe_args.num_experts) % degree:
        raise ConfigError(
            "parallelism.expert_parallel_degree",
            degree,
            f"must divide the {experts} experts of model.flavor = {job_config.model.flavor!r}",
        )


def _check_pipeline(job_config: JobConfig) -> None:
    """Check that the model has a pipeline, and that batches divide into its microbatches."""
    layout, batch_size = job_config.parallelism, job_config.training.local_batch_size
    if (degree := layout.pipeline_parallel_degree) <= 1:
        return
    spec = train_spec_module.get_train_spec(job_config.model.name)
    if spec.pipelining_fn is None:
        raise ConfigError(
            "parallelism.pipeline_parallel_degree",
            degree,
            f"must be 1: TorchTitan has no pipeline for model.name = {job_config.model.name!r}",
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
            f"must be a multiple of {microbatches}, the pipeline's number of microbatches "
            f"(training.local_batch_size = {batch_size} / "
            f"parallelism.pipeline_parallel_microbatch_size = {size})",
        )


def _check_lm_head(job_config: JobConfig) -> None:
    """Check that the LM head can be computed in chunks."""
    chunks = lm_head_section(job_config).chunks
    if chunks == 1:
        return
    if (degree := job_config.parallelism.pipeline_parallel_degree) > 1:
        raise ConfigError(
            "lm_head.chunks",
            chunks,
            f"must be 1 with parallelism.pipeline_parallel_degree = {degree}; to save memory, "
            "lower parallelism.pipeline_parallel_microbatch_size instead",
        )
    for name in job_config.model.converters:
        kind, _, precision = name.rpartition(".")
        if kind == "quantize.linear":
            kept = getattr(job_config.quantize.linear, precision).filter_fqns
            if not any(part in "output" for part in kept):
                raise ConfigError(
                    "lm_head.chunks",
                    chunks,
                    f'must be 1 if the LM head is quantized; add "output" to {name}.filter_fqns to '
                    "leave it as it is",
                )
