"""The trainer of both phases (paper, Section 3).

In a superposition step, the loader returns sequences of s * L data tokens. They are folded into
bags. The loss is normalized over all ranks and accumulation steps. The bag size s is that of the
step's stage. In recovery, and without ``[superposition]``, every step is upstream's own.
"""

import functools
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.logging import logger
from typing_extensions import override

from ..checks.agreement import contradictions, run_facts
from ..checks.job import check_job
from ..checks.machine import check_launch
from ..checks.model import has_experts
from ..config.job_config import lm_head_section, superposition_section
from ..config.layout import global_batch_size
from ..config.schedule import build_schedule, stages_without_steps
from ..core import IGNORE_INDEX, BatchShape, Phase, Schedule, Stage, document_ids, fold
from ..data.build import announce_text
from ..data.loader import PhaseDataloader
from ..data.shards.loader import ShardsDataloader, announce_data
from ..data.tokenizer import announce_tokenizer
from ..data.workers import Batch
from ..errors import ConfigError
from ..resilience.trainer import ResilientTrainer
from ..upstream.parallelize import add_up_partial_gradients, around_shape_inference, forget_shapes
from .experts import LoadBalancer
from .phase_loss import PhaseLoss, Targets, loss_heads
from .reinit import reinitialize
from .train_spec import superposition_train_spec

# torch.compile's default limit is 8 shapes of a function. An LM head in chunks has 2 per bag size.
_COMPILED_BAG_SIZES = 4


class SuperpositionTrainer(ResilientTrainer):
    """A trainer with a superposition phase before ordinary training.

    Raises:
        ConfigError: from the constructor, before a process group or a device is used, if the job
            config cannot run.
    """

    loss_fn: PhaseLoss

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The phase and the bag size of each step."""
        return build_schedule(self.job_config)

    @override
    def check(self, job_config: JobConfig) -> None:
        check_job(job_config)
        check_launch(job_config)

    @override
    def change_spec(self, spec: TrainSpec) -> TrainSpec:
        model_args = spec.model_args[self.job_config.model.flavor]
        self.load_balancer = (
            LoadBalancer(self.job_config, model_args) if has_experts(model_args) else None
        )
        return superposition_train_spec(spec, self.job_config, self, self.load_balancer)

    @override
    def build(self, job_config: JobConfig) -> None:
        super().build(job_config)
        self.heads = loss_heads(self.model_parts)
        if (chunks := lm_head_section(job_config).chunks) > 1 and not self.heads:
            raise ConfigError(
                "lm_head.chunks", chunks, "must be 1: a model converter has replaced the LM head"
            )
        if self.load_balancer and self.parallel_dims.pp_enabled:
            around_shape_inference(self.pp_schedule, self.load_balancer.not_counting)
        self._coefficients: torch.Tensor | None = None  # for the loss of a superposition step
        self._divisor: torch.Tensor | None = None  # for the loss of a pipeline
        self._flops_length = job_config.training.seq_len  # length that FLOPs are counted at
        self._announce()

    def batch_shape(self, step: int) -> BatchShape:
        """Return the shape of a micro-batch at ``step`` (from 1)."""
        training = self.job_config.training
        return self.schedule.batch_shape(step, training.local_batch_size, training.seq_len)

    # A step: data tokens -> bags -> loss

    @override
    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """Yield micro-batches of data tokens with the shape of the current step."""
        if isinstance(data_iterable, PhaseDataloader):
            data_iterable.begin(completed_steps=self.step - 1)
        shape = None
        for input_dict, labels in super().batch_generator(data_iterable):
            if self.schedule.enabled:
                previous, shape = shape, self.batch_shape(self.step)
                if shape != previous:
                    self._set_flops_per_latent(shape)
                self.metrics_processor.count_batch(
                    data_tokens=labels.numel(), latents=shape.sequences * shape.latents
                )
            yield input_dict, labels

    @override
    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        self.metrics_processor.steps_since_last_log += 1
        changes = self.step > 1 and self.schedule.changes_after(self.step - 1)
        if changes:
            self._change_bag_size()
        self._coefficients = None
        if self.load_balancer:
            sequences = global_batch_size(self.job_config, self.dp_degree)
            self.load_balancer.begin_step(sequences * self.job_config.training.seq_len)
        if self.schedule.phase(self.step) is Phase.SUPERPOSITION:
            data_iterator = self._folded(data_iterator)
        super().train_step(data_iterator)
        if changes:
            self._set_timeouts(self.job_config.comm.train_timeout_seconds)

    def _folded(self, data_iterator: Iterator[Batch]) -> Iterator[Batch]:
        """Yield folded micro-batches; fold at the first one, where the end of data is handled."""
        yield from self.fold_step(data_iterator)

    def fold_step(self, data_iterator: Iterator[Batch]) -> list[Batch]:
        """Fold all micro-batches of a step, and set the coefficients of their loss."""
        microbatches, bag_size = [], self.schedule.bag_size_at(self.step)
        for _ in range(self.gradient_accumulation_steps):
            input_dict, labels = next(data_iterator)
            input_dict["input"], labels = fold(
                input_dict["input"], labels, bag_size, self.schedule.mode
            )
            microbatches.append((input_dict, labels))
        self._coefficients = self._loss_coefficients([labels for _, labels in microbatches])
        return microbatches

    def _loss_coefficients(self, labels: list[torch.Tensor]) -> torch.Tensor:
        """Return coefficients that normalize the loss over the step's targets on all ranks.

        Upstream divides the summed loss by the number of valid targets on all ranks, T. The
        coefficients contain a factor T, so that the result is the global mean of the bag loss.
        """
        bag_loss = self.loss_fn.bag_loss
        counts = torch.stack([bag_loss.counts(batch) for batch in labels]).sum(0)
        targets = torch.stack([(batch != IGNORE_INDEX).sum() for batch in labels]).sum(0, True)
        total = torch.cat([counts, targets])
        if self.device.type != "cpu":
            total = total.pin_memory().to(self.device, non_blocking=True)
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(total, group=self.parallel_dims.get_mesh("batch").get_group())
        counts, targets = total[:-1], total[-1]
        return (bag_loss.coefficients(counts) * targets).float()

    @override
    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        if self.parallel_dims.pp_enabled:
            # Upstream's schedule runs backward from the sum and divides only the logged loss
            # (pytorch/torchtitan#2972), so gradients and their norm would have another scale.
            self._divisor, kwargs["global_valid_tokens"] = kwargs["global_valid_tokens"], 1.0
        return super().forward_backward_step(**kwargs)

    @override
    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple:
        bags = input_dict["input"]
        if bags.ndim == 2:
            batch = super().post_dataloading_process(input_dict, labels)
        else:
            # Upstream makes masks and positions, and shards the context, for one token per bag.
            # The bags are then sharded by the resulting positions.
            stand_in = document_ids(bags, getattr(self.tokenizer, "eos_id", None))
            _, labels, extra_inputs, extra_kwargs = super().post_dataloading_process(
                input_dict | {"input": stand_in}, labels
            )
            if self.parallel_dims.cp_enabled:
                positions = extra_kwargs["positions"].long()  # (B, l)
                bags = bags.take_along_dim(positions[..., None], dim=1)  # -> (B, l, s)
            batch = (bags, labels, extra_inputs, extra_kwargs)
        self.loss_fn.expect(Targets(batch[1], self._coefficients, self._divisor), self.heads)
        return batch

    @override
    def before_clipping(self, parameters: list[nn.Parameter]) -> None:
        add_up_partial_gradients(parameters)

    # The boundary, and changes from stage to stage

    def _change_bag_size(self) -> None:
        """Prepare the first step of a stage or of recovery, also if the launch resumes there.

        Such a step compiles, as the first step of a launch does.
        """
        schedule, enters_recovery = self.schedule, self.step > self.schedule.boundary
        if enters_recovery:
            logger.info(f"Boundary: {schedule.boundary} superposition steps done, recovery begins")
        else:
            stage = next(stage for stage in schedule.stages if stage.first == self.step)
            logger.info(f"Stage: {self._stage_in_words(stage)}")
        comm = self.job_config.comm
        self._set_timeouts(max(comm.init_timeout_seconds, comm.train_timeout_seconds))
        if self.keeps_checkpoint(self.step - 1):
            self.checkpointer.wait()
        before, now = (self.batch_shape(step) for step in (self.step - 1, self.step))
        ended = sum(stage.last < self.step for stage in schedule.stages)
        # At a second shape of the model's input, torch.compile would compile for any shape, which
        # is slower. After too many bag sizes, it would no longer compile the loss.
        other_shape = (before.sequences, before.latents) != (now.sequences, now.latents)
        if other_shape or (ended % _COMPILED_BAG_SIZES == 0 and not enters_recovery):
            torch.compiler.reset()
        if self.parallel_dims.pp_enabled:
            forget_shapes(self.pp_schedule)
        if enters_recovery:
            self._enter_recovery()

    def _enter_recovery(self) -> None:
        """Give the modules of ``reinit_at_recovery`` new weights."""
        if names := superposition_section(self.job_config).reinit_at_recovery:
            logger.info(f"Boundary: new random weights for {', '.join(names)}")
            seed = (self.job_config.debug.seed or 0) + self.schedule.boundary
            reinitialize(self.model_parts, names, self.optimizers, seed)

    def _set_timeouts(self, seconds: int) -> None:
        """Set the timeouts of collectives; call it on all ranks at once."""
        dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)

    @override
    def should_continue_training(self) -> bool:
        goes_on = super().should_continue_training()
        ends = self.schedule.enabled and superposition_section(self.job_config).stop_at_boundary
        if goes_on and ends and self.step >= self.schedule.boundary:
            self.checkpointer.wait()
            logger.info(
                f"Ends at the boundary, step {self.step} of {self.job_config.training.steps}"
            )
            return False
        return goes_on

    # What the trainer reports to checkpoints, logs and metrics

    @override
    def is_boundary(self, step: int) -> bool:
        return step == self.schedule.boundary > 0

    @override
    def keeps_checkpoint(self, step: int) -> bool:
        each_stage = superposition_section(self.job_config).checkpoint_each_stage
        return self.is_boundary(step) or (each_stage and self.schedule.changes_after(step))

    @override
    def name_of_step(self, step: int) -> str:
        return f"step {step} ({self.schedule.phase(step)} phase)"

    @override
    def run_facts(self) -> dict[str, Any]:
        mixture = self.dataloader.mixture if isinstance(self.dataloader, ShardsDataloader) else None
        return run_facts(self.job_config, self.schedule, self.tokenizer, mixture, self.dp_degree)

    @override
    def contradictions(self, manifest: dict[str, Any], not_loaded: list[str]) -> list[str]:
        return contradictions(manifest, self.facts, not_loaded)

    @override
    def manifest(self) -> dict[str, Any]:
        return {"phase": str(self.schedule.phase(self.step))} | super().manifest()

    def data_metrics(self) -> dict[str, float]:
        """Return the metrics of the loader; none for text."""
        return self.dataloader.metrics() if isinstance(self.dataloader, ShardsDataloader) else {}

    def expert_metrics(self) -> dict[str, float]:
        """Return the metrics of the step's mixture of experts; none for a dense model."""
        return self.load_balancer.metrics(self.device) if self.load_balancer else {}

    def _set_flops_per_latent(self, shape: BatchShape) -> None:
        """Correct upstream's FLOPs per token, which it counts at training.seq_len.

        Attention is cheaper for shorter sequences. With pipeline parallelism there is no whole
        model, so the difference is added to upstream's count.
        """
        part = self.model_parts[0]
        counted, flops = (
            self.model_args.get_nparams_and_flops(part, length)[1]
            for length in (self._flops_length, shape.latents)
        )
        self.metrics_processor.num_flops_per_token += flops - counted
        self._flops_length = shape.latents

    def _announce(self) -> None:
        """Log the data and the stages of the run, and warn about mistakes."""
        if dist.get_rank() == 0:
            announce_tokenizer(self.tokenizer)
            announce_text("training", self.dataloader)
        if isinstance(self.dataloader, ShardsDataloader):
            announce_data(self.job_config, self.dataloader.mixture, self.dp_degree)
        if self.schedule.enabled and not self.job_config.checkpoint.enable:
            logger.warning(
                "checkpoint.enable = false: there will be no boundary checkpoint. Set it to true "
                "to keep one"
            )
        if self.load_balancer:
            self.load_balancer.announce(self.job_config.model.name)
        for stage in self.schedule.stages:
            logger.info(f"Superposition: {self._stage_in_words(stage)}")
        for number, bag_size in stages_without_steps(self.job_config):
            logger.warning(
                f"Stage {number}, bags of {bag_size} data tokens, has no steps and is skipped"
            )

    def _stage_in_words(self, stage: Stage) -> str:
        shape = self.batch_shape(stage.first)
        return (
            f"bags of {stage.bag_size} data tokens in steps {stage.first} to {stage.last} of "
            f"{self.job_config.training.steps} (mode {self.schedule.mode}); a sequence is "
            f"{shape.data_tokens} data tokens, {shape.latents} latents"
        )
