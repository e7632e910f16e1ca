"""Extend TensorBoard: combined charts, and losses over data tokens as well as over steps."""

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, LoggerContainer, TensorBoardLogger
from typing_extensions import override

from ..upstream.names import loggers_of

# The charts of the "custom scalars" tab, each with several curves.
LAYOUT = {
    "Token superposition": {
        "loss: bags in superposition, next token in recovery and validation": [
            "Multiline",
            ["^loss_metrics/superposition", "^loss_metrics/recovery", "^validation_metrics/loss"],
        ],
        "the same over data tokens": [
            "Multiline",
            ["^by_data_tokens/(superposition|recovery|validation)$"],
        ],
        "phase: bag size, and 1 in superposition": ["Multiline", ["^bag_size", "^superposition$"]],
        "experts: largest and smallest share of a router's choices (%)": [
            "Multiline",
            [r"^experts/(largest|smallest)_share\(%\)$"],
        ],
        "scores of tasks (%)": ["Multiline", ["^evaluation/"]],
        "scores of tasks (%) over data tokens": ["Multiline", ["^by_data_tokens/evaluation/"]],
        "data tokens and latents so far": ["Multiline", ["n_tokens_seen", "n_latents_seen"]],
    }
}
BY_DATA_TOKENS = {
    "loss_metrics/superposition": "by_data_tokens/superposition",
    "loss_metrics/recovery": "by_data_tokens/recovery",
    "validation_metrics/loss": "by_data_tokens/validation",
}


class DataTokensLogger(BaseLogger):
    """Logs metrics again, with the number of data tokens instead of the step.

    Args:
        writer: writer of another logger, which closes it.
        names: new names of the metrics by their tags; by default those of the losses.
    """

    def __init__(self, writer: SummaryWriter, names: Mapping[str, str] = BY_DATA_TOKENS):
        self.writer, self.names = writer, names

    @override
    def log(self, metrics: dict[str, Any], step: int) -> None:
        for tag, name in self.names.items():
            if tag in metrics and "n_tokens_seen" in metrics:
                self.writer.add_scalar(name, metrics[tag], metrics["n_tokens_seen"])


def extend_tensorboard(logger: BaseLogger) -> BaseLogger:
    """Return upstream's logger; if it writes to TensorBoard, add the charts and the second axis."""
    if isinstance(logger, LoggerContainer):
        for part in loggers_of(logger):
            if isinstance(part, TensorBoardLogger):
                part.writer.add_custom_scalars(LAYOUT)
                logger.add_logger(DataTokensLogger(part.writer))
    return logger
