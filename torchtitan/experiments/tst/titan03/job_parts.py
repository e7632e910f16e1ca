"""Parts of TorchTitan 0.2.2 that a job can ask for, and that 0.3 lacks."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torchtitan.components.validate import Validator
from torchtitan.distributed.activation_checkpoint import FullAC
from typing_extensions import override


class LayerwiseAC(FullAC):
    """Recompute every n-th layer, as ``activation_checkpoint.selective_ac_option = "n"`` asks."""

    @dataclass(kw_only=True, slots=True)
    class Config(FullAC.Config):
        """The config of :class:`FullAC`, and n."""

        every: int = 2
        """n; 0 recomputes all layers."""

    def __init__(self, config: Config, dump_folder: str = ""):
        super().__init__(config, dump_folder)
        self._seen, self._every = 0, config.every

    @override
    def _wrap_block(self, module: nn.Module, *, base_fqn: str | None = None) -> nn.Module:
        self._seen += 1
        if self._every and self._seen % self._every:
            return module
        return super()._wrap_block(module, base_fqn=base_fqn)


class JobValidator(Validator):
    """TorchTitan's validator, with a batch size and a sequence length of its own.

    Args:
        config: its config.
        kwargs: the other arguments of the validator; those of training are replaced.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        """The config of TorchTitan's validator, and the shape of a batch."""

        batch_size: int = 8
        """Sequences of a batch on each data-parallel rank."""

        length: int = 2048
        """Tokens of a sequence, at most ``training.seq_len``."""

    def __init__(self, config: Config, **kwargs: Any):
        shape = {"local_batch_size": config.batch_size, "seq_len": config.length}
        super().__init__(config, **kwargs | shape)
