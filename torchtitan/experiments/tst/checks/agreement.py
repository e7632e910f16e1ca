"""The values that must be equal in a job and in the checkpoint that it resumes from."""

from typing import Any

from torchtitan.components.checkpoint import DATALOADER
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig

from ..config.job_config import SECTION, superposition_section, text_dataset_section
from ..core import Schedule
from ..data.shards.mixture import Mixture
from ..data.text.datasets import is_ours, loader_of
from ..data.text.files import data_files
from ..data.tokenizer_identity import checksum
from ..resilience.checkpoint.manifests import differences
from ..resilience.run_folder import job_facts
from .model import has_experts, has_router_bias, model_args_of

# Keys that the position in the data depends on.
_OF_POSITION = {
    "training.dataset",
    "training.dataset_path",
    "training.dataloader.num_workers",
    "text_dataset.text_key",
    "token_shards.weights",
}


def run_facts(
    job_config: JobConfig,
    schedule: Schedule,
    tokenizer: BaseTokenizer | None,
    mixture: Mixture | None,
    dp_degree: int,
) -> dict[str, Any]:
    """Return the values that a checkpoint records and a resumed job must match, by TOML key.

    A step ratio is recorded as a number of steps. A tokenizer and token shards are recorded as
    checksums of their content. Local text files are recorded as a checksum of their names and
    sizes.
    """
    section = superposition_section(job_config)
    superposition = {
        "bag_size": _one_or_each([stage.bag_size for stage in schedule.stages], none=1),
        "steps": _one_or_each([stage.steps for stage in schedule.stages], none=0),
        "mode": section.mode,
        "scale": section.scale,
        "loss": section.loss,
        "weighting": section.weighting,
    }
    return {f"{SECTION}.{name}": value for name, value in superposition.items()} | {
        **job_facts(job_config, dp_degree),
        "model.hf_assets_path": tokenizer and f"a tokenizer with checksum {checksum(tokenizer)}",
        **_data_facts(job_config, mixture),
        **_expert_facts(job_config),
    }


def _expert_facts(job_config: JobConfig) -> dict[str, Any]:
    """Return whether the router has a bias, because the bias is part of the model."""
    if not has_experts(model_args_of(job_config)):
        return {}
    return {"load_balance.method": "bias" if has_router_bias(job_config) else "without a bias"}


def _one_or_each(values: list[int], none: int) -> int | list[int]:
    """Return the value of a single stage, or a list for several; ``none`` without stages."""
    return values if len(values) > 1 else (values or [none])[0]


def _data_facts(job_config: JobConfig, mixture: Mixture | None) -> dict[str, Any]:
    """Return the values that the position in the data depends on."""
    if mixture is None:
        workers = job_config.training.dataloader.num_workers
        # Upstream's loader has a position for each worker.
        facts: dict[str, Any] = {
            "training.dataloader.num_workers": workers if workers > 1 else "at most 1"
        }
        if is_ours(job_config.training.dataset):
            facts["text_dataset.text_key"] = text_dataset_section(job_config).text_key
            loader = loader_of(job_config.training.dataset)
            if (path := job_config.training.dataset_path) and "://" not in path:
                checksum_of_files = data_files(path, loader.suffixes).checksum()
                facts["training.dataset_path"] = f"text files with checksum {checksum_of_files}"
        return facts
    checksums = [source.checksum() for source in mixture.sources]
    return {
        "training.dataset_path": f"token shards with checksum {', '.join(checksums)}",
        "token_shards.weights": mixture.shares,
    }


def contradictions(
    manifest: dict[str, Any], facts: dict[str, Any], not_loaded: list[str]
) -> list[str]:
    """Return the differences between a job and a checkpoint, a line with both values for each.

    After the boundary, the job may lack ``[superposition]``: recovery does not depend on it.

    Args:
        manifest: content of the checkpoint's manifest.
        facts: values of the job, from :func:`run_facts`.
        not_loaded: value of ``checkpoint.exclude_from_loading``.
    """
    # A run of another trainer has no superposition.
    off_throughout = {f"{SECTION}.bag_size": 1, f"{SECTION}.steps": 0}
    saved, step = off_throughout | manifest["run"], manifest["step"]
    steps = saved[f"{SECTION}.steps"]
    in_recovery = step >= (sum(steps) if isinstance(steps, list) else steps)
    off = facts[f"{SECTION}.bag_size"] == 1
    both_off = off and saved[f"{SECTION}.bag_size"] == 1
    ignored = {key for key in saved if key.startswith(f"{SECTION}.")}
    if not (both_off or (off and in_recovery)):
        ignored = set()
    if DATALOADER in not_loaded:
        ignored |= _OF_POSITION
    return differences(saved, facts, ignored)
