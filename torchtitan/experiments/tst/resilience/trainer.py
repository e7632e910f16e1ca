"""A fault-tolerant trainer for any TorchTitan run, with or without superposition.

It is upstream's trainer with these additions:

- its checkpoints are complete or absent, checked, and resume on other numbers of ranks
  (:mod:`.checkpoint`);
- on a stop signal to any rank, all ranks end after the same step with a checkpoint (:mod:`.stop`);
- it never takes an optimizer step on a loss or a gradient that is not finite (:mod:`.step_check`);
- its run folder holds the resolved config (:mod:`.run_folder`).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import DATALOADER
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.config import JobConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer
from typing_extensions import override

from ..config.job_config import resilience_section
from ..upstream.construction import built_by
from ..upstream.refusals import refusals_as_config_errors
from ..upstream.replaced import replaced
from .checkpoint.manager import ResilientCheckpointManager
from .checkpoint.manifests import differences
from .run_folder import job_facts, write_config
from .step_check import StepCheck
from .stop import Stopped, StopRequest

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class ResilientTrainer(Trainer):
    """Upstream's trainer with safe checkpoints, orderly stops and checks of each step.

    A subclass can override :meth:`check`, :meth:`build`, :meth:`change_spec`, :meth:`run_facts`,
    :meth:`contradictions`, :meth:`is_boundary`, :meth:`keeps_checkpoint` and :meth:`name_of_step`.

    Raises:
        ConfigError: from the constructor, for a job that TorchTitan refuses to build.
    """

    checkpointer: ResilientCheckpointManager

    def __init__(self, job_config: JobConfig):
        self.check(job_config)
        self.stop_request = StopRequest()
        if job_config.checkpoint.enable and not job_config.checkpoint.load_only:
            self.stop_request.listen()
        try:
            self.build(job_config)
            if dist.get_rank() == 0:
                write_config(job_config)
        except BaseException:
            self.stop_request.close()
            raise

    def check(self, job_config: JobConfig) -> None:
        """Check the job before a process group or a device is touched."""

    def build(self, job_config: JobConfig) -> None:
        """Build everything that training needs."""
        resilience = resilience_section(job_config)
        manager = functools.partial(
            ResilientCheckpointManager,
            run=self,
            total_steps=job_config.training.steps,
            resilience=resilience,
        )
        with built_by(manager, self.change_spec), refusals_as_config_errors():
            super().__init__(job_config)
        self.host_group = _host_group(job_config)
        self.facts = self.run_facts()
        self._losses: list[torch.Tensor] = []
        self._grad_norm: torch.Tensor | None = None
        self.step_check = StepCheck(
            self.optimizers, resilience.max_skipped_steps, _maximum_of_ranks, self.share
        )
        self.optimizers.register_step_pre_hook(self.before_optimizer_step)

    def change_spec(self, spec: TrainSpec) -> TrainSpec:
        """Return the train spec to build from, given the model's."""
        return spec

    @functools.cached_property
    def dp_degree(self) -> int:
        """Number of data-parallel ranks."""
        layout = self.parallel_dims
        return layout.get_mesh("batch").size() if layout.dp_enabled else 1

    # The record of the run in a checkpoint

    def run_facts(self) -> dict[str, Any]:
        """Return the values, by key, that a checkpoint and a job resuming from it must agree on."""
        return job_facts(self.job_config, self.dp_degree)

    def contradictions(self, manifest: dict[str, Any], not_loaded: list[str]) -> list[str]:
        """Return where the job differs from a checkpoint, with both values in each line.

        Facts that only the trainer of the checkpoint knows are ignored.

        Args:
            manifest: manifest of the checkpoint.
            not_loaded: ``checkpoint.exclude_from_loading``.
        """
        ignored = set(manifest["run"].keys() - self.facts.keys())
        if DATALOADER in not_loaded:
            ignored.add("training.dataset")
        return differences(manifest["run"], self.facts, ignored)

    def is_boundary(self, step: int) -> bool:
        """Return whether a phase of the run ends with this step; its checkpoint is kept."""
        return False

    def keeps_checkpoint(self, step: int) -> bool:
        """Return whether the checkpoint after this step is always written and never deleted."""
        return self.is_boundary(step)

    def manifest(self) -> dict[str, Any]:
        """Return the record of the run for a checkpoint that is written now."""
        return {
            "data_tokens": self.data_tokens_seen(),
            "skipped_steps": self.skipped_steps(),
            "run": self.facts,
        }

    def restore(self, manifest: dict[str, Any]) -> None:
        """Restore what the states lack, or hold for another number of ranks, from a manifest."""
        self.ntokens_seen = manifest["data_tokens"] // self.dp_degree
        self.step_check.skipped = manifest["skipped_steps"]

    def data_tokens_seen(self) -> int:
        """Return the number of data tokens read so far on all ranks."""
        return self.ntokens_seen * self.dp_degree

    def skipped_steps(self) -> int:
        """Return the number of optimizer steps of the run that were skipped so far."""
        self.step_check.settle()
        return self.step_check.skipped

    # A step

    @override
    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        self._losses.clear()
        try:
            with self._recorded_grad_norm():
                super().train_step(data_iterator)
            last_step = self.step == self.job_config.training.steps
            if last_step or self.checkpointer.will_save(self.step):
                self.step_check.settle()
        except DataloaderExhaustedError:  # this package's loaders end in the same step on all ranks
            self.step -= 1
            steps = self.job_config.training.steps
            logger.warning(f"The data ends after step {self.step} of {steps}: training stops there")
            self.checkpointer.save_unless_saved(self.step)
            raise

    @override
    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        loss = super().forward_backward_step(**kwargs)
        self._losses.append(loss.detach())
        return loss

    @contextmanager
    def _recorded_grad_norm(self) -> Iterator[None]:
        """Record a step's gradient norm before the optimizer's step, where upstream has no hook."""
        clip = dist_utils.clip_grad_norm_

        @functools.wraps(clip)
        def clip_and_record(parameters: list[nn.Parameter], *args: Any, **kwargs: Any) -> Any:
            self.before_clipping(parameters)
            self._grad_norm = clip(parameters, *args, **kwargs)
            return self._grad_norm

        with replaced(dist_utils, "clip_grad_norm_", clip_and_record):
            yield

    def before_clipping(self, parameters: list[nn.Parameter]) -> None:
        """Handle the gradients of a step before their norm is computed; does nothing here."""

    def before_optimizer_step(self, *args: Any) -> None:
        """Tell all ranks of numbers that are not finite and of stop requests."""
        if self.job_config.comm.mode == "fake_backend":
            return  # there are no other ranks: the result would be whatever is in memory
        assert self._grad_norm is not None
        loss = torch.stack(self._losses).sum()
        if isinstance(loss, DTensor):  # with loss parallel
            loss = loss.full_tensor()
        stop = self.stop_request.signal != 0
        self.step_check.before_step(self.name_of_step(self.step), loss, self._grad_norm, stop)

    def name_of_step(self, step: int) -> str:
        """Return the name of a step in messages."""
        return f"step {step}"

    # The end

    @property
    def stopping(self) -> bool:
        """Whether to end after this step, with a checkpoint; the same on all ranks."""
        return self.step_check.stop

    @override
    def should_continue_training(self) -> bool:
        continues = super().should_continue_training()
        if continues and self.stopping:
            self.checkpointer.save_unless_saved(self.step)
            raise Stopped
        return continues

    @override
    def train(self) -> None:
        try:
            super().train()
            self.step_check.settle()  # where the data ended, or the phase
        except Stopped:
            self.share(None)  # wait until every rank is here
            self.stop_request.ignore_signals()
            logger.warning(
                f"Stopped after step {self.step} with a checkpoint. Launch again to resume"
            )
            self.close()
            dist.destroy_process_group()
            raise

    @override
    def close(self) -> None:
        super().close()
        self.stop_request.close()

    def share(self, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, on every rank.

        It is exchanged between the hosts, so no device waits for it.
        """
        if self.host_group is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.host_group)
        return values


def _host_group(job_config: JobConfig) -> dist.ProcessGroup | None:
    """Create a group for small messages between the hosts; None if this is the only process."""
    if dist.get_world_size() == 1 or job_config.comm.mode != "default":
        return None
    return dist.new_group(backend="gloo")


def _maximum_of_ranks(values: torch.Tensor) -> None:
    """Replace the values by their maximum over all ranks, in place, on the device."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
