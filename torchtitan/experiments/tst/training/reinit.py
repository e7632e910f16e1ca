"""Give modules new random weights at the start of recovery (the ablation of Table 2)."""

from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.protocols import ModelProtocol
from torchtitan.tools.utils import device_module, device_type


@torch.no_grad()
def reinitialize(
    model_parts: list[nn.Module], names: list[str], optimizers: OptimizersContainer, seed: int
) -> None:
    """Give the named modules new weights, as at the start of a run, and zero optimizer state.

    The whole model is initialized by its own rules, and then everything else is restored. This
    needs memory for one more copy of the parameters. The new weights depend on ``seed`` only, and
    the state of the random number generators does not change.

    Args:
        model_parts: parts of the model, as in the trainer.
        names: attributes of the model, such as "tok_embeddings" and "output".
        optimizers: optimizers of these model parts.
        seed: seed of the new weights.
    """
    renewed: set[nn.Parameter] = set()
    devices = [] if device_type == "cpu" else [device_module.current_device()]
    with torch.random.fork_rng(devices, device_type=device_type):
        torch.manual_seed(seed)
        for model in model_parts:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # after a validation, parameters may still be gathered
            for name in names:
                if (part := getattr(model, name, None)) is not None:
                    renewed.update(part.parameters())
            kept = [(p, p.clone()) for p in model.parameters() if p not in renewed]
            buffers = [
                (module, name, buffer)
                for module in model.modules()
                for name, buffer in module.named_buffers(recurse=False)
            ]
            cast(ModelProtocol, model).init_weights()
            for parameter, value in kept:
                parameter.copy_(value)
            for module, name, buffer in buffers:
                setattr(module, name, buffer)
    for optimizer in optimizers.optimizers:
        for parameter in renewed:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
