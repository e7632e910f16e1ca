"""What must fit together in a job, from config and files alone.

It runs before a process group or a device is touched.
"""

import importlib
from pathlib import Path
from typing import Any

import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.config import JobConfig as UpstreamJobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from .core import Schedule
from .job_config import (
    SECTION,
    ConfigError,
    Superposition,
    boundary_step,
    build_schedule,
    check_section,
    fail,
    key,
)


def check_job(job_config: UpstreamJobConfig) -> None:
    """Check that the job can run.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    if job_config.experimental.custom_import:  # may register models and datasets
        importlib.import_module(job_config.experimental.custom_import)
    section: Superposition = getattr(job_config, SECTION, Superposition())
    check_section(section)
    model_args = _model_args(job_config)
    if section.bag_size > 1:
        _check_steps(section, job_config.training.steps)
        _check_combinations(section)
        schedule = build_schedule(job_config)
        if schedule.enabled:
            _check_shapes(job_config, schedule)
            _check_attention(section, job_config.model.flavor, model_args)
            _check_parallelism(job_config)
    _check_dataset(job_config, "training")
    if job_config.validation.enable:
        _check_dataset(job_config, "validation")
    _check_tokenizer(job_config, model_args)


def _check_steps(section: Superposition, total_steps: int) -> None:
    ratio, steps = section.step_ratio, section.steps
    if ratio is not None and steps is not None:
        fail(
            f"{key('step_ratio')} = {ratio!r} and {key('steps')}",
            steps,
            f"give one of the two (on the command line, --{key('step_ratio')} None unsets one)",
        )
    if ratio is None and steps is None:
        fail(
            key("bag_size"),
            section.bag_size,
            f"needs {key('step_ratio')} in [0, 1) or {key('steps')} < training.steps",
        )
    boundary = boundary_step(section, total_steps)
    if boundary >= total_steps:
        name = "steps" if steps is not None else "step_ratio"
        fail(
            key(name),
            getattr(section, name),
            f"{boundary} superposition steps must be fewer than training.steps = {total_steps}",
        )


def _check_combinations(section: Superposition) -> None:
    if section.loss != "mce" and section.weighting != "uniform":
        fail(
            key("weighting"),
            section.weighting,
            f'must be "uniform" with {key("loss")} = {section.loss!r}: the bag is a set',
        )
    if section.mode == "output" and section.scale == "batch":
        fail(
            key("scale"),
            section.scale,
            f'must be "sequence" with {key("mode")} = "output", which reads no extra data',
        )


def _check_shapes(job_config: UpstreamJobConfig, schedule: Schedule) -> None:
    training, validation = job_config.training, job_config.validation
    if training.seq_len < 1:
        fail("training.seq_len", training.seq_len, "must be at least 1 token")
    try:
        shape = schedule.batch_shape(1, training.local_batch_size, training.seq_len)
    except ValueError as error:
        fail(
            "training.seq_len",
            training.seq_len,
            f'{error}, {key("bag_size")}, as {key("scale")} = "batch" needs',
        )
    if schedule.mode == "output" and schedule.bag_size > training.seq_len:
        fail(
            key("bag_size"),
            schedule.bag_size,
            "the next s tokens do not fit into a sequence of "
            f"training.seq_len = {training.seq_len} tokens",
        )
    degree = job_config.parallelism.tensor_parallel_degree
    if shape.latents % degree:
        fail(
            "training.seq_len",
            training.seq_len,
            f"gives {shape.latents} latents, which "
            f"parallelism.tensor_parallel_degree = {degree} does not divide",
        )
    if validation.enable and validation.seq_len > training.seq_len:
        fail(
            "validation.seq_len",
            validation.seq_len,
            "must be at most training.seq_len = "
            f"{training.seq_len} tokens, the ordinary sequence length",
        )


def _check_attention(section: Superposition, flavor: str, model_args: Any) -> None:
    if section.mode == "output" or getattr(model_args, "attn_type", "sdpa") == "sdpa":
        return
    if model_args.attn_mask_type == "block_causal":
        fail(
            "model.flavor",
            flavor,
            'has attn_mask_type = "block_causal", which finds documents '
            f"by token ids that bags do not have; with {key('mode')} = {section.mode!r} choose a "
            'flavor with "causal"',
        )


def _check_parallelism(job_config: UpstreamJobConfig) -> None:
    for name in ("context_parallel_degree", "pipeline_parallel_degree"):
        if (degree := getattr(job_config.parallelism, name)) > 1:
            fail(f"parallelism.{name}", degree, "must be 1 with superposition, for now")


def _model_args(job_config: UpstreamJobConfig) -> Any:
    name, flavor = job_config.model.name, job_config.model.flavor
    try:
        flavors = train_spec_module.get_train_spec(name).model_args
    except ValueError as error:
        raise ConfigError(f"model.name = {name!r}: {error}") from None
    if flavor not in flavors:
        fail("model.flavor", flavor, f"{name} has {', '.join(flavors)}")
    return flavors[flavor]


def _check_dataset(job_config: UpstreamJobConfig, section: str) -> None:
    config = getattr(job_config, section)
    name, path = config.dataset.lower(), config.dataset_path
    if name not in DATASETS:
        fail(f"{section}.dataset", config.dataset, f"must be one of {', '.join(DATASETS)}")
    if path is None:
        path = DATASETS[name].path
        if path.count("/") == 1:  # owner/name on the Hugging Face hub
            return
    if not path or not ("://" in path or Path(path).exists()):
        fail(f"{section}.dataset_path", path, f"no such file or folder (dataset {name})")


def _check_tokenizer(job_config: UpstreamJobConfig, model_args: Any) -> None:
    path = job_config.model.hf_assets_path
    if not Path(path).exists():
        fail("model.hf_assets_path", path, "no such folder (it holds the tokenizer)")
    spec = train_spec_module.get_train_spec(job_config.model.name)
    if spec.build_tokenizer_fn is None:
        return
    try:
        tokenizer = spec.build_tokenizer_fn(job_config)
    except FileNotFoundError as error:
        raise ConfigError(f"model.hf_assets_path = {path!r}: {error}") from None
    if tokenizer.get_vocab_size() > model_args.vocab_size:
        fail(
            "model.hf_assets_path",
            path,
            f"its tokenizer has {tokenizer.get_vocab_size():,} "
            f"entries, more than the {model_args.vocab_size:,} of model.flavor = "
            f"{job_config.model.flavor!r}",
        )
