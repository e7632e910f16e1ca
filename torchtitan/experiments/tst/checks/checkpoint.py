"""Check the checkpoint keys of a job against each other and against the files that are there."""

from pathlib import Path
from typing import Any

import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.components.checkpoint import TRAIN_STATE
from torchtitan.config import Checkpoint
from torchtitan.config import JobConfig as UpstreamJobConfig

from ..config.job_config import resilience_section
from ..errors import ConfigError
from ..resilience.checkpoint import inventory
from ..resilience.checkpoint.inventory import Kind
from ..resilience.checkpoint.manifests import CheckpointError, ContradictionError, read_manifest
from .agreement import contradictions


def check_last_save(job_config: UpstreamJobConfig) -> None:
    """Check that the keys of the last save do not contradict each other.

    Raises:
        ConfigError: if they do.
    """
    config = job_config.checkpoint
    if not config.enable or config.load_only:
        return
    if config.last_save_in_hf:
        _check_adapter(job_config, "last_save_in_hf")
    if config.last_save_in_hf and not config.last_save_model_only:
        raise ConfigError(
            "checkpoint.last_save_in_hf",
            True,
            "needs checkpoint.last_save_model_only = true: the Hugging Face format holds the model "
            "only",
        )
    if config.export_dtype != "float32" and not config.last_save_model_only:
        raise ConfigError(
            "checkpoint.export_dtype",
            config.export_dtype,
            "needs checkpoint.last_save_model_only = true: a full checkpoint keeps float32",
        )


def _check_adapter(job_config: UpstreamJobConfig, key: str) -> None:
    """Check that the model can be converted to Hugging Face format, for a key that needs it."""
    name = job_config.model.name
    if train_spec_module.get_train_spec(name).state_dict_adapter is None:
        raise ConfigError(
            f"checkpoint.{key}",
            True,
            f"must be false: TorchTitan has no state-dict adapter for model.name = {name!r}",
        )


def check_loading(job_config: UpstreamJobConfig) -> Path | None:
    """Check that the checkpoint or model that the job loads can be loaded.

    Returns:
        The checkpoint that it resumes from, as far as that is known before the launch, or the final
        model of a finished run; None if the job starts at step 1.

    Raises:
        ConfigError: if a key is wrong; the error says what is at the path instead.
        CheckpointError: if ``checkpoint.load_step`` cannot be loaded, or if there are checkpoints
            but none can be resumed.
    """
    config = job_config.checkpoint
    folder = Path(job_config.job.dump_folder, config.folder)
    if config.create_seed_checkpoint:
        return None
    if not config.enable:
        _check_nothing_to_load(config)
        return None
    if config.load_step >= 0:
        inventory.check_load_step(folder, config.load_step, config.exclude_from_loading)
        return inventory.step_folder(folder, config.load_step) if config.load_step else None
    found = inventory.list_checkpoints(folder)
    if point := inventory.resume_point(found, job_config.training.steps):
        return point.path if point.step else None  # a seed checkpoint has the model only
    if any(checkpoint.resumable for checkpoint in found):
        return None  # damaged: the launch reports the damage
    inventory.check_may_start_anew(folder, found)
    _check_initial_load(job_config)
    path = config.initial_load_path
    return Path(path) if path and not config.initial_load_model_only else None


def _check_nothing_to_load(config: Checkpoint) -> None:
    """Check that no key asks for a checkpoint if checkpoints are off."""
    for key, off in (
        ("load_step", (-1,)),
        ("initial_load_path", (None, "")),
        ("initial_load_in_hf", (False,)),
    ):
        if (value := getattr(config, key)) not in off:
            raise ConfigError(
                f"checkpoint.{key}",
                value,
                "needs checkpoint.enable = true; without it the run starts from random weights",
            )


def _check_initial_load(job_config: UpstreamJobConfig) -> None:
    """Check the initial weights of a job that has no checkpoint of its own."""
    config = job_config.checkpoint
    if config.initial_load_in_hf_quantized and not config.initial_load_in_hf:
        raise ConfigError(
            "checkpoint.initial_load_in_hf_quantized",
            True,
            "needs checkpoint.initial_load_in_hf = true",
        )
    key, value = "checkpoint.initial_load_path", config.initial_load_path
    if config.initial_load_in_hf:
        _check_adapter(job_config, "initial_load_in_hf")
        if not config.initial_load_model_only:
            raise ConfigError(
                "checkpoint.initial_load_in_hf",
                True,
                "needs checkpoint.initial_load_model_only = true: the Hugging Face format holds "
                "the model only",
            )
        if not value:
            key, value = "model.hf_assets_path", job_config.model.hf_assets_path
    elif not value:
        return
    _check_initial_folder(config, key, value)


def _check_initial_folder(config: Checkpoint, key: str, value: str) -> None:
    """Check that the folder has what the config says."""
    path = Path(value)
    kind, what = inventory.identify(path), inventory.describe(path)
    is_hf = kind is Kind.HUGGING_FACE
    if kind is Kind.DAMAGED:
        raise ConfigError(key, value, f"{what}; give another one, or copy it again")
    if config.initial_load_in_hf and not is_hf and kind is not Kind.INCOMPLETE:
        needs = "needs a folder with *.safetensors weights"
        if kind in (Kind.FULL, Kind.MODEL):
            needs = (
                "is for weights in Hugging Face format, but this is TorchTitan's; set it to false"
            )
        raise ConfigError(key, value, f"{what}; checkpoint.initial_load_in_hf = true {needs}")
    if is_hf and not config.initial_load_in_hf:
        raise ConfigError(key, value, f"{what}: set checkpoint.initial_load_in_hf = true")
    if kind in (Kind.FOREIGN, Kind.INCOMPLETE):
        allowed = "It must be a checkpoint, such as RUN/checkpoint/step-1000"
        raise ConfigError(key, value, f"{what}. {allowed}")
    if kind is Kind.MODEL and not config.initial_load_model_only:
        raise ConfigError(key, value, f"{what}: set checkpoint.initial_load_model_only = true")
    if is_hf:
        try:
            inventory.check_weights(path)
        except CheckpointError as error:
            raise ConfigError(key, value, str(error)) from None


def check_agreement(job_config: UpstreamJobConfig, facts: dict[str, Any], checkpoint: Path) -> None:
    """Check that the config does not contradict the checkpoint.

    Args:
        job_config: config of the job.
        facts: values of the job, from :func:`.agreement.run_facts`.
        checkpoint: folder of the checkpoint that the job resumes from, or of its final model.

    Raises:
        CheckpointError: if it does; the error has both values of each key.
    """
    not_loaded = job_config.checkpoint.exclude_from_loading
    if TRAIN_STATE in not_loaded or resilience_section(job_config).allow_config_mismatch:
        return
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError:
        return  # damaged: there may be another checkpoint
    if manifest and (found := contradictions(manifest, facts, not_loaded)):
        raise ContradictionError(checkpoint, found)
