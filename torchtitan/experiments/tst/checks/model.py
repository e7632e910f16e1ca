"""The model of a job, built without memory, and checks of the keys that name its modules."""

import copy
import inspect
from collections import Counter
from typing import Any

import torch
import torchtitan.protocols.train_spec as train_spec_module
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import build_optimizers_with_moe_load_balancing
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from ..config.job_config import lm_head_section, load_balance_section
from ..core import BagEmbedding, LossHead
from ..core.embedding import lost_if_replaced
from ..errors import ConfigError
from ..upstream.refusals import refusals_as_config_errors

_BY_HAND = "parallelism.module_fqns_per_model_part"
_RECOMPUTED = "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns"
# of the meshes that TorchTitan makes for parameters
_MESH_DIMENSIONS = ("pp", "dp_replicate", "fsdp", "cp", "tp", "efsdp", "ep", "etp")


def model_args_of(job_config: JobConfig) -> Any:
    """Return the model args of the job's flavor.

    Raises:
        ConfigError: if there is no such model or flavor.
    """
    name, flavor = job_config.model.name, job_config.model.flavor
    try:
        flavors = train_spec_module.get_train_spec(name).model_args
    except ValueError as error:
        raise ConfigError(
            "model.name", name, f"{error} Use a model of TorchTitan, such as llama3 or qwen3"
        ) from None
    if flavor not in flavors:
        raise ConfigError(
            "model.flavor", flavor, f"must be a flavor of {name}: {', '.join(flavors)}"
        )
    return flavors[flavor]


def has_experts(model_args: Any) -> bool:
    """Return whether a flavor has mixtures of experts."""
    moe_args = getattr(model_args, "moe_args", None)
    return moe_args is not None and getattr(model_args, "moe_enabled", True)


def has_router_bias(job_config: JobConfig) -> bool:
    """Return whether a job balances its experts by a bias in the router."""
    method = load_balance_section(job_config).method
    build = train_spec_module.get_train_spec(job_config.model.name).build_optimizers_fn
    of_upstream = build is build_optimizers_with_moe_load_balancing
    return method == "bias" or (method == "upstream" and of_upstream)


def model_on_meta(job_config: JobConfig) -> tuple[Any, nn.Module]:
    """Return a job's model args and its model on the meta device: shapes without memory.

    Raises:
        ConfigError: if TorchTitan refuses to build the model, or as :func:`check_modules`.
    """
    spec = train_spec_module.get_train_spec(job_config.model.name)
    args = copy.deepcopy(spec.model_args[job_config.model.flavor])
    job_config = copy.deepcopy(job_config)
    job_config.parallelism.expert_parallel_comm_backend = "standard"  # another needs its package
    with refusals_as_config_errors(), torch.device("meta"):
        args.update_from_config(job_config)
        model = spec.model_cls(args)
    check_modules(job_config, model)
    return args, model


def check_modules(job_config: JobConfig, model: nn.Module) -> None:
    """Check that a model has the embedding and the LM head that superposition replaces.

    Raises:
        ConfigError: if one is missing or of another kind, or if forward lacks what a key needs.
    """
    name, chunks = job_config.model.name, lm_head_section(job_config).chunks
    embedding, head = (getattr(model, part, None) for part in ("tok_embeddings", "output"))
    if not isinstance(embedding, nn.Embedding):
        raise ConfigError(
            "model.name", name, "has no nn.Embedding named tok_embeddings, which bags need"
        )
    if lost := lost_if_replaced(embedding, nn.Embedding, BagEmbedding):
        raise ConfigError(
            "model.name",
            name,
            f"its tok_embeddings, {type(embedding).__name__}, has {lost}, which bags would not "
            "use; move what it adds into the forward of the model",
        )
    plain = isinstance(head, nn.Linear) and not lost_if_replaced(head, nn.Linear, LossHead)
    if chunks > 1 and (not plain or head.bias is not None):  # type: ignore[union-attr]
        raise ConfigError(
            "lm_head.chunks",
            chunks,
            f"must be 1: model.name = {name!r} has no plain nn.Linear named output without a bias",
        )
    degree = job_config.parallelism.context_parallel_degree
    kinds = {p.name: p.kind for p in inspect.signature(model.forward).parameters.values()}
    if degree > 1 and not ("positions" in kinds or inspect.Parameter.VAR_KEYWORD in kinds.values()):
        raise ConfigError(
            "parallelism.context_parallel_degree",
            degree,
            f"must be 1: forward of model.name = {name!r} has no argument positions, which says "
            "where the latents of a rank are",
        )


def check_parallel(
    job_config: JobConfig, model: nn.Module, parallel_dims: ParallelDims, replicated: bool
) -> None:
    """Check that a model's ``parallelize_fn`` did what the job's layout asks for.

    Without it, ranks would train different weights, or do the same work. For data and context
    parallelism, every trainable parameter must be a DTensor on a mesh of it, or the model under
    DDP. For tensor parallelism, one such parameter is enough. What this does not notice: a mesh
    whose dimensions have other names than TorchTitan's, which may be of other ranks.

    Args:
        job_config: config of the job.
        model: the model, or the stage of a pipeline.
        parallel_dims: layout of the job.
        replicated: whether the model is under DDP.

    Raises:
        ConfigError: if the model is not parallel.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for kind, wanted, dimensions in (
        ("data_parallel_shard", parallel_dims.dp_shard_enabled, ("fsdp", "efsdp", "ep")),
        ("context_parallel", parallel_dims.cp_enabled, ("fsdp", "efsdp", "ep")),
        (
            "data_parallel_replicate",
            parallel_dims.dp_replicate_enabled and not replicated,
            ("dp_replicate",),
        ),
        ("tensor_parallel", parallel_dims.tp_enabled, ("tp", "etp")),
    ):
        without = [name for name, p in trainable.items() if not _is_on_mesh(p, dimensions)]
        enough = kind == "tensor_parallel" and len(without) < len(trainable)
        if wanted and without and not enough:
            raise ConfigError(
                f"parallelism.{kind}_degree",
                getattr(job_config.parallelism, f"{kind}_degree"),
                f"must be 1: parallelize_fn of model.name = {job_config.model.name!r} does not "
                f"apply it to the parameter {without[0]}",
            )


def _is_on_mesh(parameter: torch.Tensor, dimensions: tuple[str, ...]) -> bool:
    """Return whether a parameter is on a mesh with one of these dimensions, or one unknown."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ("unnamed",)
    return any(name in dimensions or name not in _MESH_DIMENSIONS for name in names)


def check_module_names(job_config: JobConfig) -> None:
    """Check the keys that name modules of the model.

    TorchTitan would silently skip a layer that is in no stage of a pipeline.

    Raises:
        ConfigError: if a name is missing, unknown, repeated, or not of an ``nn.Linear``.
    """
    checkpointing, layout = job_config.activation_checkpoint, job_config.parallelism
    stages = layout.module_fqns_per_model_part
    if stages is not None and layout.pipeline_parallel_degree > 1:
        _check_stages(stages, model_on_meta(job_config)[1])
    if (checkpointing.mode, checkpointing.selective_ac_option) == ("selective", "op"):
        names = checkpointing.per_op_sac_force_recompute_mm_shapes_by_fqns
        if names and names != type(checkpointing)().per_op_sac_force_recompute_mm_shapes_by_fqns:
            _check_linear(names, model_on_meta(job_config)[1])


def _check_stages(stages: list[list[str]], model: nn.Module) -> None:
    """Check that the stages of a pipeline have each module of the model once."""
    wanted = []
    for name, child in model.named_children():
        parts = isinstance(child, nn.ModuleDict | nn.ModuleList)
        wanted += [f"{name}.{part}" for part, _ in child.named_children()] if parts else [name]
    given = Counter(name for stage in stages for name in stage)
    for what, names in (
        ("does not name", [name for name in wanted if name not in given]),
        ("names modules that do not exist:", [name for name in given if name not in wanted]),
        ("names more than once:", [name for name, times in given.items() if times > 1]),
    ):
        if names:
            raise ConfigError(
                _BY_HAND,
                stages,
                f"{what} {', '.join(names)}; the stages must name each of {', '.join(wanted)} once",
            )


def _check_linear(names: list[str], model: nn.Module) -> None:
    """Check that names are parts of the names of ``nn.Linear`` modules only."""
    modules = dict(model.named_modules())
    for name in names:
        found = [path for path in modules if name in path]
        others = [path for path in found if not isinstance(modules[path], nn.Linear)]
        if not found or others:
            what = f"matches {others[0]}, which is not one" if others else "matches none"
            raise ConfigError(
                _RECOMPUTED, names, f"must be parts of names of nn.Linear modules; {name!r} {what}"
            )
