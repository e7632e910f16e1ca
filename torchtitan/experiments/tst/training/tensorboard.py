"""TensorBoard: charts that belong together, and losses over data tokens as well as over steps."""

from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, LoggerContainer, TensorBoardLogger
from typing_extensions import override

from ..upstream.names import loggers_of

# The "custom scalars" tab: what belongs on the same axes
LAYOUT = {
    "Token superposition": {
        "loss: bags in superposition, next token in recovery and validation": [
            "Multiline",
            ["^loss_metrics/superposition", "^loss_metrics/recovery", "^validation_metrics/loss"],
        ],
        "the same over data tokens": ["Multiline", ["by_data_tokens/.*"]],
        "phase: bag size, and 1 in superposition": ["Multiline", ["^bag_size", "^superposition$"]],
        "experts: largest and smallest share of a router's choices (%)": [
            "Multiline",
            [r"^experts/(largest|smallest)_share\(%\)$"],
        ],
        "data tokens and latents so far": ["Multiline", ["n_tokens_seen", "n_latents_seen"]],
    }
}
BY_DATA_TOKENS = {
    "loss_metrics/superposition": "by_data_tokens/superposition",
    "loss_metrics/recovery": "by_data_tokens/recovery",
    "validation_metrics/loss": "by_data_tokens/validation",
}


class DataTokensLogger(BaseLogger):
    """The losses once more, with the number of data tokens in the place of the step."""

    def __init__(self, writer: SummaryWriter):
        self.writer = writer  # which another logger closes

    @override
    def log(self, metrics: dict[str, Any], step: int) -> None:
        for tag, name in BY_DATA_TOKENS.items():
            if tag in metrics:
                self.writer.add_scalar(name, metrics[tag], metrics["n_tokens_seen"])


def extend_tensorboard(logger: BaseLogger) -> BaseLogger:
    """Upstream's logger, with the layout and the second axis where it writes to TensorBoard."""
    if isinstance(logger, LoggerContainer):
        for part in loggers_of(logger):
            if isinstance(part, TensorBoardLogger):
                part.writer.add_custom_scalars(LAYOUT)
                logger.add_logger(DataTokensLogger(part.writer))
    return logger
