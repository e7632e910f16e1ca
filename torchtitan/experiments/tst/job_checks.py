"""What must fit together in a job, from config and files alone.

It runs before a process group or a device is touched.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.config import JobConfig as UpstreamJobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, build_text_dataloader

from .core import Schedule
from .job_config import (
    ConfigError,
    Superposition,
    boundary_step,
    build_schedule,
    check_section,
    superposition_section,
)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # name or owner/name


def check_job(job_config: UpstreamJobConfig) -> None:
    """Check that the job can run.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    if job_config.experimental.custom_import:  # may register models and datasets
        importlib.import_module(job_config.experimental.custom_import)
    section = superposition_section(job_config)
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
    _check_workers(job_config, schedule)
    _check_dataset(job_config, "training")
    if job_config.validation.enable:
        _check_dataset(job_config, "validation")
    _check_tokenizer(job_config, model_args)


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
    training, validation = job_config.training, job_config.validation
    if training.seq_len < 1:
        raise ConfigError("training.seq_len", training.seq_len, "must be at least 1 token")
    try:
        shape = schedule.batch_shape(1, training.local_batch_size, training.seq_len)
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
    degree = job_config.parallelism.tensor_parallel_degree
    if shape.latents % degree:
        raise ConfigError(
            "training.seq_len",
            training.seq_len,
            f"gives {shape.latents} latents, which "
            f"parallelism.tensor_parallel_degree = {degree} does not divide",
        )
    if validation.enable and validation.seq_len != training.seq_len:
        raise ConfigError(
            "validation.seq_len",
            validation.seq_len,
            f"must be training.seq_len = {training.seq_len} tokens, the ordinary sequence length",
        )


def _check_attention(section: Superposition, flavor: str, model_args: Any) -> None:
    if section.mode == "output" or getattr(model_args, "attn_type", "sdpa") == "sdpa":
        return
    if model_args.attn_mask_type == "block_causal":
        raise ConfigError(
            "model.flavor",
            flavor,
            'has attn_mask_type = "block_causal", which finds documents by token ids that bags do '
            f'not have; with superposition.mode = {section.mode!r} choose a flavor with "causal"',
        )


def _check_parallelism(job_config: UpstreamJobConfig) -> None:
    for name in ("context_parallel_degree", "pipeline_parallel_degree"):
        if (degree := getattr(job_config.parallelism, name)) > 1:
            raise ConfigError(
                f"parallelism.{name}", degree, "must be 1 with superposition, for now"
            )


def _model_args(job_config: UpstreamJobConfig) -> Any:
    name, flavor = job_config.model.name, job_config.model.flavor
    try:
        flavors = train_spec_module.get_train_spec(name).model_args
    except ValueError as error:
        raise ConfigError("model.name", name, str(error)) from None
    if flavor not in flavors:
        raise ConfigError("model.flavor", flavor, f"{name} has {', '.join(flavors)}")
    return flavors[flavor]


def _check_dataset(job_config: UpstreamJobConfig, section: str) -> None:
    config = getattr(job_config, section)
    if config.dataset.lower() not in DATASETS:
        raise ConfigError(
            f"{section}.dataset", config.dataset, f"must be one of {', '.join(DATASETS)}"
        )
    registered = DATASETS[config.dataset.lower()].path
    path = registered if config.dataset_path is None else config.dataset_path
    if _HUB_NAME.fullmatch(registered) and not path.startswith(("/", ".", "~")):
        return  # on the Hugging Face hub, under this name or another
    if not path or not ("://" in path or Path(path).exists()):
        raise ConfigError(
            f"{section}.dataset_path", path, f"no such file or folder (dataset {config.dataset})"
        )


def _check_workers(job_config: UpstreamJobConfig, schedule: Schedule) -> None:
    """See :mod:`.data.loader`: the position of a worker of upstream's text dataset is inexact."""
    spec = train_spec_module.get_train_spec(job_config.model.name)
    carried = []
    if schedule.enabled and spec.build_dataloader_fn is build_text_dataloader:
        carried.append("training")
    if job_config.validation.enable:
        carried.append("validation")
    for section in carried:
        if workers := getattr(job_config, section).dataloader.num_workers:
            raise ConfigError(
                f"{section}.dataloader.num_workers",
                workers,
                "must be 0: a worker's position in the data is inexact, so data would be repeated",
            )


def _check_tokenizer(job_config: UpstreamJobConfig, model_args: Any) -> None:
    path = job_config.model.hf_assets_path
    if not Path(path).exists():
        raise ConfigError("model.hf_assets_path", path, "no such folder (it holds the tokenizer)")
    spec = train_spec_module.get_train_spec(job_config.model.name)
    if spec.build_tokenizer_fn is None:
        return
    try:
        tokenizer = spec.build_tokenizer_fn(job_config)
    except FileNotFoundError as error:
        raise ConfigError("model.hf_assets_path", path, str(error)) from None
    entries = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    if entries > model_args.vocab_size:
        raise ConfigError(
            "model.hf_assets_path",
            path,
            f"its tokenizer has {entries:,} "
            f"entries, more than the {model_args.vocab_size:,} of model.flavor = "
            f"{job_config.model.flavor!r}",
        )
