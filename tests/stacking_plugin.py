"""What a user registers to train with parts of their own, by ``experimental.custom_import``.

``llama3_muon`` is Llama 3 under Muon and AdamW, ``qwen3_balanced`` Qwen 3 with its experts' load
balanced.
"""

import dataclasses

import torch
from torchtitan.components.optimizer import (
    OptimizersContainer,
    build_optimizers_with_moe_load_balancing,
)
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec


class MuonAndAdamW(OptimizersContainer):
    """Muon for the matrices of the layers, AdamW for embedding, head and norms.

    Upstream checkpoints the learning rates of the first optimizer only, for all of them, so the
    two share one; ``match_rms_adamw`` makes AdamW's right for Muon.
    """

    def __init__(self, model_parts, config):
        self.optimizers, self.model_parts = [], []
        options = {"lr": config.lr, "weight_decay": config.weight_decay}
        for part in model_parts:
            matrices, others = [], []
            for name, parameter in part.named_parameters():
                hidden = name.startswith("layers.") and parameter.ndim == 2
                (matrices if hidden else others).append(parameter)
            self.optimizers += [
                torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(others, **options, fused=True),
            ]
            self.model_parts += [part, part]  # state_dict() pairs each with an optimizer
        self._post_init([p for part in model_parts for p in part.parameters()], options)


def build_muon(model_parts, optimizer_config, parallel_dims, ft_manager=None):
    return MuonAndAdamW(model_parts, optimizer_config)


for name, model, build in (
    ("llama3_muon", "llama3", build_muon),
    ("qwen3_balanced", "qwen3", build_optimizers_with_moe_load_balancing),
):
    spec = dataclasses.replace(get_train_spec(model), build_optimizers_fn=build)
    register_train_spec(name, spec)
