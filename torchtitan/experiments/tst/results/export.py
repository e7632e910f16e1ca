"""Export a checkpoint to a Hugging Face folder: weights, config and tokenizer of the model.

Upstream's state-dict adapter converts the weights and their names. The folder loads in
``transformers`` as LlamaForCausalLM, Qwen3ForCausalLM or Qwen3MoeForCausalLM.
"""

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torchtitan.protocols.train_spec as train_spec_module
from huggingface_hub import save_torch_state_dict
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.protocols import BaseStateDictAdapter
from torchtitan.tools.logging import logger

from ..checks.extensions import register_extensions
from ..checks.model import model_args_of
from ..config.manager import SuperpositionConfigManager
from ..data.tokenizer import TokenizerError, build_tokenizer, open_tokenizer
from ..errors import ArgumentError
from ..resilience.checkpoint import inventory, manifests
from ..resilience.checkpoint.manifests import CheckpointError
from ..resilience.checkpoint.moves import linked
from ..resilience.checkpoint.reader import SafeLoadPlanner, SafeReader, read_metadata
from ..resilience.run_folder import CONFIG_FILE
from .transformers_config import ExportError, check_name, config_of


def read_job(checkpoint: Path, arguments: list[str]) -> JobConfig:
    """Return the config of a checkpoint's run.

    Args:
        checkpoint: a checkpoint in the folder of the run, which has the resolved config.
        arguments: arguments of the job, which override that config; ``--job.config_file`` replaces
            it.

    Raises:
        CheckpointError: if the run wrote no config, like runs of TorchTitan's own trainer.
    """
    if not any(argument.startswith("--job.config_file") for argument in arguments):
        found = [folder / CONFIG_FILE for folder in checkpoint.parents]
        config = next((path for path in found if path.is_file()), None)
        if config is None:
            raise CheckpointError(
                f"{checkpoint}: no {CONFIG_FILE} in a folder above it (TorchTitan's own trainer "
                "writes none). Give the job with --job.config_file"
            )
        arguments = [f"--job.config_file={config}", *arguments]
    job_config = SuperpositionConfigManager().parse_args(arguments)
    register_extensions(job_config)
    return job_config


def is_exported(model: Path) -> bool:
    """Return whether a folder is an exported model, not a checkpoint or a run folder."""
    return (model / "config.json").is_file()


@contextmanager
def exported(model: Path, job_arguments: list[str]) -> Iterator[Path]:
    """Yield an exported folder: the model itself, or a temporary export (TMPDIR) of a checkpoint.

    Args:
        model: a checkpoint, a run folder or an exported folder.
        job_arguments: arguments of a checkpoint's job, as for :func:`read_job`.

    Raises:
        ArgumentError: for an exported folder whose tokenizer cannot be read, or that comes with
            arguments of a job.
        CheckpointError: for a checkpoint that cannot be read.
        ExportError: for a checkpoint that cannot be exported.
    """
    if is_exported(model):
        if job_arguments:
            raise ArgumentError(
                f"{model} is exported already: remove {' '.join(job_arguments)}, which is for a "
                "checkpoint"
            )
        try:
            open_tokenizer(model)  # the errors of transformers name no file
        except TokenizerError as error:
            raise ArgumentError(f"{model}: {error}") from error
        yield model
        return
    checkpoint = inventory.find_checkpoint(model)
    job_config = read_job(checkpoint, job_arguments)
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        output = Path(folder, checkpoint.name)
        export(checkpoint, output, job_config)
        yield output


def check_exportable(model: Path, job_arguments: list[str]) -> None:
    """Check that a model is exported, or that transformers has a class for it.

    Args:
        model: a checkpoint or an exported folder.
        job_arguments: arguments of a checkpoint's job, as for :func:`read_job`.

    Raises:
        CheckpointError: as :func:`read_job`.
        ExportError: if there is no such class.
    """
    if not is_exported(model):
        check_name(read_job(model, job_arguments).model.name)


def export(checkpoint: Path, output: Path, job_config: JobConfig) -> None:
    """Write a checkpoint's model as a Hugging Face folder, all of it or nothing.

    Args:
        checkpoint: a checkpoint of either phase, in DCP's format or that of
            ``checkpoint.last_save_in_hf``; see
            :func:`..resilience.checkpoint.inventory.find_checkpoint`.
        output: the folder to write.
        job_config: config of the run: model, tokenizer, sequence length, and the dtype of the
            exported weights (``checkpoint.export_dtype``).

    Raises:
        CheckpointError: if the checkpoint is damaged or has another model.
        ConfigError: if there is no usable tokenizer.
        ExportError: if the model's class in transformers cannot represent the model.
        FileExistsError: if ``output`` already exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} already exists. Give another folder, or remove it")
    check_name(job_config.model.name)
    model_args = copy.deepcopy(model_args_of(job_config))
    tokenizer = build_tokenizer(job_config)
    spec = train_spec_module.get_train_spec(job_config.model.name)
    model_args.update_from_config(job_config)
    with torch.device("meta"):
        expected = spec.model_cls(model_args).state_dict()
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = config_of(job_config, model_args, expected) | special
    with linked(checkpoint) as files:
        if manifests.read_manifest(files) is None:
            logger.warning(
                f"{checkpoint} has no {manifests.MANIFEST}: it is not checked for damage"
            )
        weights = _load(files, expected, spec.state_dict_adapter(model_args, None))
    dtype = job_config.checkpoint.export_dtype
    # copies: some weights are views of one tensor, which safetensors would take for shared weights
    weights = {
        key: weights.pop(key).to(TORCH_DTYPE_MAP[dtype], copy=True).contiguous()
        for key in list(weights)
    }
    _write_folder(output, weights, config, special, tokenizer)
    logger.info(f"Exported {checkpoint} to {output}: {config['architectures'][0]}, {dtype}")


def _write_folder(
    output: Path,
    weights: dict[str, torch.Tensor],
    config: dict[str, Any],
    special: dict[str, int | None],
    tokenizer: HuggingFaceTokenizer,
) -> None:
    """Write the files into a temporary folder, and rename it when it is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{output.name}.unfinished-", dir=output.parent))
    try:
        save_torch_state_dict(weights, unfinished, metadata={"format": "pt"})
        _write_json(unfinished / "config.json", config)
        mode = (unfinished / "config.json").stat().st_mode
        for path in unfinished.glob("*.safetensors"):  # only their owner can read these
            path.chmod(mode)
        _write_json(unfinished / "generation_config.json", special)
        tokenizer.tokenizer.save(str(unfinished / "tokenizer.json"))
        # the class that uses tokenizer.json without changes
        plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
        _write_json(unfinished / "tokenizer_config.json", (tokenizer.config or {}) | plain)
        readers = mode & 0o444
        unfinished.chmod(0o700 | readers | readers >> 2)  # only its owner can open it, too
        unfinished.rename(output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _load(
    checkpoint: Path, expected: dict[str, torch.Tensor], adapter: BaseStateDictAdapter
) -> dict[str, torch.Tensor]:
    """Return the model's tensors by their names in transformers, checked for damage.

    Args:
        checkpoint: a checkpoint of any kind.
        expected: state dict of the model.
        adapter: state-dict adapter of the model.
    """
    in_hf = inventory.identify(checkpoint) is inventory.Kind.HUGGING_FACE
    manifest = manifests.read_manifest(checkpoint)
    if manifest and (found := manifests.damages(checkpoint, manifest["files"])):
        listed = "; ".join(found)
        raise CheckpointError(f"the checkpoint is damaged: {listed}. Use another checkpoint")
    if in_hf:
        inventory.check_weights(checkpoint)
        expected = adapter.to_hf(expected)
        reader: FileSystemReader = adapter.get_hf_storage_reader(str(checkpoint))
        saved = reader.read_metadata().state_dict_metadata
    else:
        reader = SafeReader(checkpoint)
        saved = read_metadata(checkpoint).state_dict_metadata
    _check_same_model(checkpoint, saved, expected)
    state: dict[str, Any] = {
        key: torch.empty_like(tensor, device="cpu") for key, tensor in expected.items()
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, planner=SafeLoadPlanner(), no_dist=True)
    except (CheckpointException, ValueError) as error:
        raise CheckpointError(f"could not load {checkpoint}: {error}") from error
    return state if in_hf else _convert(state, adapter)


def _check_same_model(
    checkpoint: Path, saved: dict[str, Any], expected: dict[str, torch.Tensor]
) -> None:
    """Check that a checkpoint has the model's names and shapes.

    Raises:
        CheckpointError: for a tensor that is missing or has another shape.
        ExportError: for a tensor that the model does not have.
    """
    for key, tensor in expected.items():
        entry = saved.get(key)
        shape = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        if shape != tuple(tensor.shape):
            has = f"has the shape {shape}" if shape else "is missing"
            raise CheckpointError(
                f"{checkpoint} has another model than the config: {key} {has}, and the config's "
                f"model has the shape {tuple(tensor.shape)}. Give the config of the checkpoint's "
                "run"
            )
    modules = {key.partition(".")[0] for key in expected}
    for key in saved:
        if key.partition(".")[0] in modules and key not in expected:
            raise ExportError(
                f"{checkpoint} has another model than the config: {key} has no place in the "
                "exported model. Give the config of the checkpoint's run"
            )


_BIAS = '. Train with load_balance.method = "auxiliary_loss" from the start: it needs no bias'


def _convert(
    state: dict[str, torch.Tensor], adapter: BaseStateDictAdapter
) -> dict[str, torch.Tensor]:
    """Convert tensors with upstream's adapter, one at a time, because it drops unknown tensors.

    Raises:
        ExportError: for a dropped tensor that the exported model would need.
    """
    weights: dict[str, torch.Tensor] = {}
    for key in list(state):
        tensor = state.pop(key)
        converted = adapter.to_hf({key: tensor})
        weights |= converted
        # the router's bias for balanced experts: zero unless load_balance.method is "bias"
        is_bias = key.endswith(".moe.expert_bias")
        unused = is_bias and not tensor.any()
        if not (converted or unused or _is_tied(key, adapter.model_args)):  # type: ignore[attr-defined]
            raise ExportError(
                f"{key} has no place in the exported model, and it is not zero{_BIAS * is_bias}"
            )
    return weights


def _is_tied(key: str, model_args: Any) -> bool:
    return key == "output.weight" and getattr(model_args, "enable_weight_tying", False)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
