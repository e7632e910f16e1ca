"""The model of a job, built without memory, and checks of the keys that name its modules."""

import copy
from collections import Counter
from typing import Any

import torch
import torchtitan.protocols.train_spec as train_spec_module
from torch import nn
from torchtitan.components.optimizer import build_optimizers_with_moe_load_balancing
from torchtitan.config import JobConfig

from ..config.sections import lm_head_section, load_balance_section
from ..errors import ConfigError
from ..upstream.refusals import refusals_as_config_errors

_BY_HAND = "parallelism.module_fqns_per_model_part"
_RECOMPUTED = "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns"


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
        ConfigError: if one is missing, or is of another kind.
    """
    name, chunks = job_config.model.name, lm_head_section(job_config).chunks
    if not isinstance(getattr(model, "tok_embeddings", None), nn.Embedding):
        raise ConfigError(
            "model.name", name, "has no nn.Embedding named tok_embeddings, which bags need"
        )
    head = getattr(model, "output", None)
    if chunks > 1 and not (isinstance(head, nn.Linear) and head.bias is None):
        raise ConfigError(
            "lm_head.chunks",
            chunks,
            f"must be 1: model.name = {name!r} has no nn.Linear named output without a bias",
        )


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
