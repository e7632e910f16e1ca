"""The metrics of both phases for TorchTitan 0.3, also in ``metrics.jsonl``.

They are those of TorchTitan 0.2.2's trainer in this package: upstream's ``throughput(tps)``,
``tflops`` and ``mfu(%)`` count latents; ``n_tokens_seen``, ``n_latents_seen``, ``superposition``,
``bag_size``, ``loss_metrics/superposition`` or ``loss_metrics/recovery`` and
``data_throughput(tps)`` are added, and ``experts/*`` with an auxiliary loss.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.metrics import (
    BaseLogger,
    LoggerContainer,
    MetricsProcessor,
    _get_metrics_rank,
)
from torchtitan.distributed import ParallelDims
from typing_extensions import override

from ..core import Phase, Schedule
from ..metrics_file import (
    DATA_TOKENS,
    LATENTS,
    METRICS_FILE,
    SECONDS_PER_STEP,
    JsonLinesLogger,
    appended_to_step_line,
)


class PhaseMetricsProcessor(MetricsProcessor):
    """TorchTitan's metrics processor, with metrics of the phases.

    Attributes:
        schedule: phase and bag size of each step; the trainer sets it.
        batch: sequences of an ordinary step on all ranks, and tokens of each; the trainer sets it.
        more_metrics: returns further metrics of a step; all ranks call it.
    """

    logger: BaseLogger

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """The config of TorchTitan's metrics processor."""

    def __init__(
        self,
        config: Config,
        *,
        parallel_dims: ParallelDims,
        dump_folder: str,
        pp_schedule: str,
        **kwargs: Any,
    ):
        super().__init__(
            config,
            parallel_dims=parallel_dims,
            dump_folder=dump_folder,
            pp_schedule=pp_schedule,
            **kwargs,
        )
        self.data_tokens_less_latents = 0  # since the last log
        self.steps_since_last_log = 0
        self.more_metrics: Callable[[], dict[str, float]] = dict
        rank = _get_metrics_rank(parallel_dims=parallel_dims, pp_schedule=pp_schedule)
        self._file = Path(dump_folder) if torch.distributed.get_rank() == rank else None

    def describe(self, schedule: Schedule, batch: tuple[int, int]) -> None:
        """Set what the metrics describe, and begin ``metrics.jsonl`` on the rank that logs.

        Args:
            schedule: phase and bag size of each step.
            batch: sequences of an ordinary step on all ranks, and tokens of each.
        """
        self.schedule, self.batch = schedule, batch
        if self._file:
            loggers = LoggerContainer()
            loggers.add_logger(self.logger)
            loggers.add_logger(JsonLinesLogger(self._file / METRICS_FILE, schedule))
            self.logger = loggers

    def count_batch(self, data_tokens: int, latents: int) -> None:
        """Correct upstream's count for a micro-batch, from data tokens to latents."""
        self.ntokens_since_last_log += latents - data_tokens
        self.data_tokens_less_latents += data_tokens - latents

    @override
    def should_log(self, step: int) -> bool:
        changes = any(self.schedule.changes_after(at) for at in (step, step - 1) if at > 0)
        return changes or super().should_log(step)

    @override
    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        seconds = time.perf_counter() - self.time_last_log
        data_tokens = self.ntokens_since_last_log + self.data_tokens_less_latents
        data_tps = data_tokens / (seconds * self.parallel_dims.non_data_parallel_size)
        phase, bag_size = self.schedule.phase(step), self.schedule.bag_size_at(step)
        metrics = {
            **(extra_metrics or {}),
            **self.more_metrics(),
            "superposition": int(phase is Phase.SUPERPOSITION),
            "bag_size": bag_size,
            f"loss_metrics/{phase}": global_avg_loss,
            LATENTS: self._tokens_seen(step)[LATENTS],
            # upstream always divides by log_freq
            SECONDS_PER_STEP: seconds / max(1, self.steps_since_last_log),
            "data_throughput(tps)": data_tps,
        }
        text = f"  phase: {phase} (s={bag_size})  data tps: {round(data_tps):,}"
        with appended_to_step_line(text if self.schedule.enabled else ""):
            super().log(step, global_avg_loss, global_max_loss, grad_norm, metrics)
        self.data_tokens_less_latents = self.steps_since_last_log = 0

    @override
    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        super().log_validation(loss, step, (extra_metrics or {}) | self._tokens_seen(step))
        self.data_tokens_less_latents = self.steps_since_last_log = 0

    def _tokens_seen(self, step: int) -> dict[str, int]:
        """Return the data tokens and the latents of the first ``step`` steps."""
        seen = {DATA_TOKENS: 0, LATENTS: 0}
        for stage in self.schedule.until(step):
            shape = self.schedule.batch_shape(stage.first, *self.batch)
            seen[DATA_TOKENS] += stage.steps * shape.sequences * shape.data_tokens
            seen[LATENTS] += stage.steps * shape.sequences * shape.latents
        return seen
