"""TensorBoard: charts that belong together, and losses over data tokens as well as over steps."""

from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, LoggerContainer, TensorBoardLogger
from typing_extensions import override

BY_DATA_TOKENS = "by_data_tokens"  # folder, which TensorBoard shows as a run of its own

# The "custom scalars" tab: what belongs on the same axes
LAYOUT = {
    "Token superposition": {
        "loss: bags in superposition, next token in recovery and validation": [
            "Multiline",
            ["loss_metrics/superposition", "loss_metrics/recovery", "validation_metrics/loss"],
        ],
        "phase: bag size, and 1 in superposition": ["Multiline", ["bag_size", "superposition"]],
        "data tokens and latents so far": ["Multiline", ["n_tokens_seen", "n_latents_seen"]],
        "data tokens and latents per second and device": [
            "Multiline",
            [r"data_throughput\(tps\)", r"^throughput\(tps\)"],
        ],
    }
}


class DataTokensLogger(BaseLogger):
    """The losses with the number of data tokens in the place of the step."""

    def __init__(self, log_dir: str):
        self.writer = SummaryWriter(log_dir, max_queue=1000)

    @override
    def log(self, metrics: dict[str, Any], step: int) -> None:
        for tag, value in metrics.items():
            if tag.startswith("loss_metrics/") or tag == "validation_metrics/loss":
                self.writer.add_scalar(tag, value, metrics["n_tokens_seen"])

    @override
    def close(self) -> None:
        self.writer.close()


def extend_tensorboard(logger: BaseLogger) -> BaseLogger:
    """Upstream's logger, with the layout and the second axis where it writes to TensorBoard."""
    if isinstance(logger, LoggerContainer):
        for part in list(logger._loggers):
            if isinstance(part, TensorBoardLogger):
                part.writer.add_custom_scalars(LAYOUT)
                logger.add_logger(DataTokensLogger(f"{part.writer.log_dir}/{BY_DATA_TOKENS}"))
    return logger
