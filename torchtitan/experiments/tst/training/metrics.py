"""Log metrics of both phases, wherever upstream logs, and to ``metrics.jsonl``.

Upstream's ``throughput(tps)``, ``tflops`` and ``mfu(%)`` count latents, the positions that the
transformer sees. So you can compare them with a baseline's. We add:

- ``n_tokens_seen`` and ``n_latents_seen``: data tokens and latents so far, for training and
  validation.
- ``superposition`` (1 or 0) and ``bag_size``.
- ``loss_metrics/superposition`` or ``loss_metrics/recovery``: the training loss again, under the
  name of its phase.
- ``data_throughput(tps)``: data tokens per second and device.
- ``skipped_steps``: their number so far, if ``resilience.max_skipped_steps`` is set.
- ``data_share/NAME(%)`` and ``data_epochs/NAME``, for each source of token shards: its share of the
  tokens read so far, and how often it was read.
- ``experts/*``, for a mixture of experts: see :func:`..expert_metrics.expert_metrics`.
- ``loss_metrics/load_balance``: the mean of the auxiliary loss over the layers. It is not part of
  the training loss.

Throughputs and times are means since the last log. The last step of a stage and the first step
after it are always logged, so that no mean mixes two bag sizes.
"""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torchtitan.components.metrics import BaseLogger, LoggerContainer, MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from typing_extensions import override

from ..config.job_config import resilience_section
from ..config.layout import global_batch_size
from ..config.schedule import build_schedule
from ..core import Phase
from ..metrics_file import (
    DATA_TOKENS,
    LATENTS,
    METRICS_FILE,
    SECONDS_PER_STEP,
    JsonLinesLogger,
    appended_to_step_line,
)
from ..resilience.wandb_run import wandb_run
from ..upstream.names import metrics_rank
from .tensorboard import extend_tensorboard


class MetricsRun(Protocol):
    """The methods of the trainer that the metrics call, on all ranks."""

    def data_tokens_seen(self) -> int:
        """Return the number of data tokens that all ranks have read so far."""

    def skipped_steps(self) -> int:
        """Return the number of skipped optimizer steps so far."""

    def data_metrics(self) -> dict[str, float]:
        """Return the metrics of the loader."""

    def expert_metrics(self) -> dict[str, float]:
        """Return the metrics of a mixture of experts."""


class SuperpositionMetricsProcessor(MetricsProcessor):
    """Upstream's metrics processor, with metrics of the phases."""

    logger: BaseLogger

    def __init__(
        self,
        run: MetricsRun,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        tag: str | None = None,
    ):
        rank = torch.distributed.get_rank()
        logging_rank = metrics_rank(parallel_dims, job_config)
        with wandb_run(job_config, rank, logging_rank):
            super().__init__(job_config, parallel_dims, tag)
        self.run = run
        self.schedule = build_schedule(job_config)
        self.latents_per_step = job_config.training.seq_len * global_batch_size(
            job_config, parallel_dims.dp_replicate * parallel_dims.dp_shard
        )
        self.data_tokens_less_latents = 0  # since the last log
        self.steps_since_last_log = 0
        self.first_log: tuple[int, float] | None = None  # step, time (s)
        if rank == logging_rank:
            loggers = LoggerContainer()
            loggers.add_logger(extend_tensorboard(self.logger))
            path = Path(job_config.job.dump_folder, METRICS_FILE)
            loggers.add_logger(JsonLinesLogger(path, self.schedule))
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
        ours = {
            "superposition": int(phase is Phase.SUPERPOSITION),
            "bag_size": bag_size,
            f"loss_metrics/{phase}": global_avg_loss,
            **self._tokens_seen(step),
            # upstream always divides by log_freq
            SECONDS_PER_STEP: seconds / max(1, self.steps_since_last_log),
            "data_throughput(tps)": data_tps,
            **self.run.data_metrics(),
            **self.run.expert_metrics(),
        }
        color = self.color
        if resilience_section(self.job_config).max_skipped_steps:
            ours["skipped_steps"] = self.run.skipped_steps()
        suffix = f"  {color.white}time left: {self._time_left(step)}{color.reset}"
        if self.schedule.enabled:
            suffix = (
                f"  {color.yellow}phase: {phase} (s={bag_size})  "
                f"{color.blue}data tps: {round(data_tps):,}{color.reset}" + suffix
            )
        with appended_to_step_line(suffix):
            super().log(
                step, global_avg_loss, global_max_loss, grad_norm, (extra_metrics or {}) | ours
            )
        self.data_tokens_less_latents = self.steps_since_last_log = 0

    @override
    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        super().log_validation(loss, step, (extra_metrics or {}) | self._tokens_seen(step))
        self.data_tokens_less_latents = self.steps_since_last_log = 0

    def _tokens_seen(self, step: int) -> dict[str, int]:
        """Return the tokens of the run so far, with a data token counted once.

        Upstream counts it on every context-parallel rank.
        """
        return {
            DATA_TOKENS: self.run.data_tokens_seen(),
            LATENTS: step * self.latents_per_step,
        }

    def _time_left(self, step: int) -> str:
        """Return the time for the remaining steps at the average pace of this launch, H:MM:SS."""
        now = time.perf_counter()
        if self.first_log is None or step <= self.first_log[0]:
            self.first_log = (step, now)
            return "?"
        first_step, first_time = self.first_log
        remaining = self.job_config.training.steps - step
        return str(timedelta(seconds=round(remaining * (now - first_time) / (step - first_step))))


def build_metrics_processor(
    run: MetricsRun,
    job_config: JobConfig,
    parallel_dims: ParallelDims,
    model_args: Any = None,
    tag: str | None = None,
) -> SuperpositionMetricsProcessor:
    """Build the metrics processor: a ``TrainSpec.build_metrics_processor_fn`` for a run."""
    return SuperpositionMetricsProcessor(run, job_config, parallel_dims, tag)
