"""Configs of the debug models with superposition, for ``torchtitan.train``.

``--module torchtitan.experiments.tst.titan03 --config llama3_debugmodel`` trains one of them. Keys
such as ``--superposition.bag_size 8`` change it, as all keys of TorchTitan's do.
"""

from torchtitan.models.llama3 import config_registry as llama3
from torchtitan.models.qwen3 import config_registry as qwen3

from .superposed import superposed
from .trainer import SuperpositionTrainer


def llama3_debugmodel() -> SuperpositionTrainer.Config:
    """Return TorchTitan's debug model of Llama 3, with bags of 6 tokens in 30 % of the steps."""
    return superposed(llama3.llama3_debugmodel(), bag_size=6, step_ratio=0.3)


def qwen3_moe_debug() -> SuperpositionTrainer.Config:
    """Return TorchTitan's debug model of Qwen 3 with experts, as :func:`llama3_debugmodel`."""
    return superposed(qwen3.qwen3_moe_debug(), bag_size=6, step_ratio=0.3)
