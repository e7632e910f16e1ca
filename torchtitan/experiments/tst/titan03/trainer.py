"""The trainer of both phases for TorchTitan 0.3 (paper, Section 3).

In a superposition step, a micro-batch is s times as many data tokens, folded into bags. Everything
else of a step is upstream's own, and in recovery, the whole step is. Without superposition, nothing
differs from upstream's trainer.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.cudagraph import cudagraph_teardown, wrap_with_cuda_graph
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer
from typing_extensions import override

from ..config.sections import LoadBalance, Superposition
from ..core import BagLoss, Phase, fold
from ..data.workers import Batch
from .checks import check_config, check_parts
from .experts import LoadBalancer
from .loss import PhaseLoss
from .record import check_record, write_record
from .shards import ShardsDataLoader


class SuperpositionTrainer(Trainer):
    """A trainer with a superposition phase before ordinary training.

    Args:
        config: its config, from ``superposed.superposed``.

    Raises:
        ConfigError: before a process group or a device is used, if the config cannot run.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """TorchTitan's config, with the sections of this package."""

        superposition: Superposition = field(default_factory=Superposition)
        load_balance: LoadBalance = field(default_factory=LoadBalance)

    config: Config
    ntokens_seen: int

    def __init__(self, config: Config):
        self.schedule = check_config(config)
        super().__init__(config)
        check_parts(self)
        section = config.superposition
        self._coefficients: torch.Tensor | None = None  # for the loss of a superposition step
        self._flops_length = config.training.seq_len
        self.phase_loss.use(BagLoss(section.loss, section.weighting, overwrite_logits=True))
        self.checkpointer.keeps = self.keeps_checkpoint
        self.metrics_processor.describe(self.schedule, (self._sequences, config.training.seq_len))
        self.load_balancer = None
        if config.load_balance.method == "auxiliary_loss":
            self.load_balancer = LoadBalancer(
                config.load_balance,
                self.model_parts,
                len(self.model_config.layers),
                self.parallel_dims,
                self.device,
            )
            self.metrics_processor.more_metrics = self.load_balancer.metrics
        for stage in self.schedule.stages:
            logger.info(
                f"Superposition: bags of {stage.bag_size} data tokens in steps {stage.first} to "
                f"{stage.last} of {config.training.steps} (mode {self.schedule.mode})"
            )

    @property
    def _sequences(self) -> int:
        """The sequences of an ordinary step on all ranks."""
        dims = self.parallel_dims
        ranks = dims.get_mesh("batch").size() if dims.dp_enabled else 1
        return self.config.training.local_batch_size * self.gradient_accumulation_steps * ranks

    @property
    def phase_loss(self) -> PhaseLoss:
        """The loss of both phases, which may be that of a chunk."""
        loss = self.loss_fn
        return loss.loss_fn if isinstance(loss, ChunkedLossWrapper) else loss

    # A step: data tokens -> bags -> loss

    @override
    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """Yield micro-batches of data tokens with the shape of their step."""
        if torch.distributed.get_rank() == 0:
            write_record(Path(self.config.dump_folder), self.schedule)
        joins = self.schedule.enabled
        if isinstance(data_iterable, ShardsDataLoader):
            joins = False  # it reads each step's windows as they must be
            count = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
            data_iterable.begin(self.schedule, count, completed_steps=self.step - 1)
        batches = super().batch_generator(data_iterable)
        yield from self._joined(batches) if joins else batches

    def _joined(self, windows: Iterator[Batch]) -> Iterator[Batch]:
        """Yield micro-batches; in superposition, several of upstream's batches make one.

        The loader returns the windows of one sequence of tokens in order (``checks`` refuses
        others of upstream's). So its state stays upstream's own, and no token is lost or repeated
        at the boundary.
        """
        for first in windows:
            length = self.config.training.seq_len
            shape = self.schedule.batch_shape(self.step, len(first[1]), length)
            count = shape.sequences * shape.data_tokens // first[1].numel()
            if count == 1:
                yield first
                continue
            batches = [first, *itertools.islice(windows, count - 1)]
            if any(labels.shape != first[1].shape for _, labels in batches):
                raise DataloaderExhaustedError  # the last batch of the data is a smaller one
            tokens, labels = (
                torch.cat(parts).view(shape.sequences, shape.data_tokens)
                for parts in zip(*((batch[0]["input"], batch[1]) for batch in batches), strict=True)
            )
            yield {"input": tokens}, labels

    @override
    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        self.metrics_processor.steps_since_last_log += 1
        changes = self.step > 1 and self.schedule.changes_after(self.step - 1)
        if changes:
            self._change_bag_size()
        self._coefficients = None
        self._set_flops_per_latent()
        if self.load_balancer:
            self.load_balancer.begin_step(self._sequences * self.config.training.seq_len)
        if self.schedule.phase(self.step) is Phase.SUPERPOSITION:
            data_iterator = self._folded(data_iterator)
        super().train_step(data_iterator)
        if changes:
            self._set_timeouts(self.config.comm.train_timeout_seconds)

    def _folded(self, data_iterator: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the folded micro-batches of a step, and set the coefficients of their loss.

        They make the loss one mean over the targets of all micro-batches and ranks.
        """
        microbatches, bag_size = [], self.schedule.bag_size_at(self.step)
        count = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        for _ in range(count):
            input_dict, labels = next(data_iterator)
            data_tokens = labels.numel()
            bags, labels = fold(input_dict["input"], labels, bag_size, self.schedule.mode)
            positions = torch.arange(bags.shape[1]).expand(bags.shape[:2]).contiguous()
            self.metrics_processor.count_batch(data_tokens, positions.numel())
            microbatches.append(({"input": bags, "positions": positions}, labels))
        bag_loss = self.phase_loss.bag_loss
        counts = torch.stack([bag_loss.counts(labels) for _, labels in microbatches]).sum(0)
        counts = counts.to(self.device)
        if self.parallel_dims.dp_enabled:
            counts = dist_utils.dist_sum_tensor(counts, self.parallel_dims.get_mesh("batch"))
        self._coefficients = bag_loss.coefficients(counts).float()
        yield from microbatches

    @override
    def forward_backward_step(
        self, *, input_dict: Any, labels: Any, global_valid_tokens: torch.Tensor
    ) -> torch.Tensor:
        if self._coefficients is not None:  # they take the place of the divisor, also in a graph
            global_valid_tokens = self._coefficients
        return super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
        )

    @override
    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        seen = self.ntokens_seen
        inputs, labels, extra_kwargs = super().post_dataloading_process(input_dict, labels)
        if self._coefficients is not None:  # upstream counts labels, which may be more or fewer
            self.ntokens_seen = seen + inputs.numel()
        return inputs, labels, extra_kwargs

    # The boundary, and changes from stage to stage

    def _change_bag_size(self) -> None:
        """Prepare the first step of a stage or of recovery, also if the launch resumes there."""
        schedule, training = self.schedule, self.config.training
        if self.step > schedule.boundary:
            logger.info(f"Boundary: {schedule.boundary} superposition steps done, recovery begins")
        else:
            logger.info(f"Stage: bags of {schedule.bag_size_at(self.step)} data tokens")
        comm = self.config.comm
        self._set_timeouts(max(comm.init_timeout_seconds, comm.train_timeout_seconds))
        before, now = (
            schedule.batch_shape(step, training.local_batch_size, training.seq_len)
            for step in (self.step - 1, self.step)
        )
        if (before.sequences, before.latents) != (now.sequences, now.latents):
            # At a second shape, torch.compile would compile for any shape, which is slower.
            torch.compiler.reset()
        if not training.disable_cuda_graphs:
            # A graph has fixed shapes, and the next one must allocate its gradients anew.
            cudagraph_teardown()
            self.optimizers.zero_grad(set_to_none=True)
            self.fwd_bwd_fn = wrap_with_cuda_graph(self._forward_backward_body)

    def _set_flops_per_latent(self) -> None:
        """Correct upstream's FLOPs per token, which it counts at ``training.seq_len``."""
        training = self.config.training
        shape = self.schedule.batch_shape(self.step, training.local_batch_size, training.seq_len)
        if shape.latents != self._flops_length:
            model = self.model_parts[0]
            counted, flops = (
                self.model_config.get_nparams_and_flops(model, length)[1]
                for length in (self._flops_length, shape.latents)
            )
            self.metrics_processor.num_flops_per_token += flops - counted
            self._flops_length = shape.latents

    def _set_timeouts(self, seconds: int) -> None:
        """Set the timeouts of collectives; call it on all ranks at once."""
        dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)

    def keeps_checkpoint(self, step: int) -> bool:
        """Return whether the checkpoint of a step is written in any case, and never deleted."""
        each_stage = self.config.superposition.checkpoint_each_stage
        at_boundary = step == self.schedule.boundary > 0
        return at_boundary or (each_stage and self.schedule.changes_after(step))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        check_record(Path(self.config.dump_folder), self.schedule, self.step)

    @override
    def should_continue_training(self) -> bool:
        ends = self.schedule.enabled and self.config.superposition.stop_at_boundary
        if ends and self.step >= self.schedule.boundary:
            self.checkpointer.maybe_wait_for_saving()
            logger.info(f"Ends at the boundary, step {self.step} of {self.config.training.steps}")
            return False
        return super().should_continue_training()
