"""The training loop's two phases: what upstream's trainer does differently in superposition.

A superposition step: the loader gives sequences of s * L data tokens, they are folded into bags,
the loss is normalised over all ranks and accumulation steps. In recovery, and without a
``[superposition]`` section, every step is upstream's own.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import tomli_w
import torch
import torch.distributed as dist
import torchtitan.protocols.train_spec as train_spec_module
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.config import JobConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer
from typing_extensions import override

from .checkpoint.agreement import run_facts
from .checkpoint.manager import ResilientCheckpointManager
from .config.errors import ConfigError
from .config.machine import check_launch
from .config.refusals import refusals_as_config_errors
from .core import IGNORE_INDEX, BatchShape, Phase, Schedule, document_ids, fold
from .data.build import announce_text
from .data.loader import Batch, PhaseDataloader
from .data.shards_loader import ShardsDataloader, announce_data
from .data.tokenizer import announce_tokenizer
from .job_checks import check_job
from .job_config import (
    CONFIG_FILE,
    build_schedule,
    lm_head_section,
    resilience_section,
    superposition_section,
)
from .parallelize import add_up_partial_gradients, forget_shapes
from .phase_loss import PhaseLoss
from .reinit import reinitialize
from .step_check import StepCheck
from .stop import Stopped, StopRequest
from .train_spec import superposition_train_spec


class SuperpositionTrainer(Trainer):
    """Upstream's trainer with a superposition phase before the ordinary one.

    It also resumes where upstream's would not (:mod:`.checkpoint`), stops in order when asked to
    (:mod:`.stop`), and does not train on a loss or a gradient that is not finite.

    Raises:
        ConfigError: from the constructor, before a process group or a device is touched, for a
            job config that cannot run.
    """

    schedule: Schedule
    loss_fn: PhaseLoss
    checkpointer: ResilientCheckpointManager

    def __init__(self, job_config: JobConfig):
        self.check(job_config)
        self.stop_request = StopRequest()
        if job_config.checkpoint.enable and not job_config.checkpoint.load_only:
            self.stop_request.listen()
        try:
            self._build(job_config)
        except BaseException:
            self.stop_request.close()
            raise

    def _build(self, job_config: JobConfig) -> None:
        self.schedule = build_schedule(job_config)
        with _superposition_train_spec(job_config), refusals_as_config_errors():
            super().__init__(job_config)
        self.loss_fn.bind(self.model_parts)
        if (chunks := lm_head_section(job_config).chunks) > 1 and not self.loss_fn.heads:
            raise ConfigError(
                "lm_head.chunks", chunks, "a model converter has replaced the LM head"
            )
        self.host_group = _host_group(job_config)
        self.dp_degree = (
            self.parallel_dims.get_mesh("batch").size() if self.parallel_dims.dp_enabled else 1
        )
        mixture = None
        if isinstance(self.dataloader, ShardsDataloader):
            mixture = self.dataloader.mixture
            self.metrics_processor.data_metrics = self.dataloader.metrics
        self.facts = run_facts(job_config, self.schedule, self.tokenizer, mixture, self.dp_degree)
        self.metrics_processor.data_tokens_seen = self.data_tokens_seen
        self.metrics_processor.skipped_steps = self._skipped_steps
        self.stop_at_boundary = (
            self.schedule.enabled and superposition_section(job_config).stop_at_boundary
        )
        self._flops_length = job_config.training.seq_len  # that FLOPs are counted at
        self._losses: list[torch.Tensor] = []
        self._grad_norm: torch.Tensor | None = None
        resilience = resilience_section(job_config)
        self.step_check = StepCheck(
            self.optimizers, resilience.max_skipped_steps, self._maximum_of_ranks, self.share
        )
        self.optimizers.register_step_pre_hook(self._before_optimizer_step)
        ResilientCheckpointManager.adopt(
            self.checkpointer,
            self,
            self.schedule.boundary,
            job_config.training.steps,
            resilience.skip_damaged,
            resilience.allow_config_mismatch,
        )
        if dist.get_rank() == 0:
            _write_config(job_config)
            announce_tokenizer(self.tokenizer)
            announce_text("training", self.dataloader)
        if mixture:
            announce_data(job_config, mixture, self.dp_degree)
        if self.schedule.enabled:
            if not job_config.checkpoint.enable:
                logger.warning("checkpoint.enable = false: there will be no boundary checkpoint")
            self._announce()
        elif self.schedule.bag_size > 1:
            logger.warning("No step is in superposition: its share of training.steps rounds to 0")

    def check(self, job_config: JobConfig) -> None:
        """What stops the job before it touches a device."""
        check_job(job_config)
        check_launch(job_config)

    @override
    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """Micro-batches of data tokens, shaped for the phase of the current step."""
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
        self._losses.clear()
        self.metrics_processor.steps_since_last_log += 1
        enters_recovery = self.schedule.enabled and self.step == self.schedule.boundary + 1
        try:
            if self.schedule.phase(self.step) is Phase.SUPERPOSITION:
                data_iterator = iter(self.fold_step(data_iterator))
            elif enters_recovery:
                self._enter_recovery()
            with _recorded_grad_norm(self):
                super().train_step(data_iterator)
            if enters_recovery:
                self._set_timeouts(self.job_config.comm.train_timeout_seconds)
            last_step = self.step == self.job_config.training.steps
            if last_step or self.checkpointer.will_save(self.step):
                self.step_check.settle()
        except DataloaderExhaustedError:  # on all ranks in the same step
            self.step -= 1
            steps = self.job_config.training.steps
            logger.warning(f"The data ends after step {self.step} of {steps}")
            self.checkpointer.save_unless_saved(self.step)
            raise

    def fold_step(self, data_iterator: Iterator[Batch]) -> list[Batch]:
        """All micro-batches of a step, folded, and the loss told how to normalise them."""
        microbatches = []
        for _ in range(self.gradient_accumulation_steps):
            input_dict, labels = next(data_iterator)
            input_dict["input"], labels = fold(
                input_dict["input"], labels, self.schedule.bag_size, self.schedule.mode
            )
            microbatches.append((input_dict, labels))
        self._set_loss_coefficients([labels for _, labels in microbatches])
        return microbatches

    def _set_loss_coefficients(self, labels: list[torch.Tensor]) -> None:
        """Normalise over all ranks' targets of this step.

        Upstream divides the summed loss by the number of valid targets on all ranks, T; the
        coefficients take T back, so that what remains is the global mean of the bag loss.
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
        self.loss_fn.coefficients = (bag_loss.coefficients(counts) * targets).float()

    def _enter_recovery(self) -> None:
        """Before the first recovery step, in this launch or in one resumed at the boundary."""
        logger.info(f"Boundary: {self.schedule.boundary} superposition steps done, recovery begins")
        # The first step of a phase compiles, as that of a launch does.
        comm = self.job_config.comm
        self._set_timeouts(max(comm.init_timeout_seconds, comm.train_timeout_seconds))
        self.checkpointer.wait()  # for the boundary checkpoint
        before, now = (self.batch_shape(step) for step in (self.step - 1, self.step))
        if (before.sequences, before.latents) != (now.sequences, now.latents):
            # Seeing a second shape, torch.compile would compile for any shape, which is slower.
            torch.compiler.reset()
        if self.parallel_dims.pp_enabled:
            forget_shapes(self.pp_schedule)
        if names := superposition_section(self.job_config).reinit_at_recovery:
            logger.info(f"Initialising {', '.join(names)} afresh")
            seed = (self.job_config.debug.seed or 0) + self.schedule.boundary
            reinitialize(self.model_parts, names, self.optimizers, seed)

    def _set_timeouts(self, seconds: int) -> None:
        """Of collectives, on all ranks at once."""
        dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)

    @override
    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple:
        bags = input_dict["input"]
        if bags.ndim == 2:
            batch = super().post_dataloading_process(input_dict, labels)
        else:
            # Upstream makes masks and positions, and shards by context, for what stands for the
            # bags; the bags follow by their positions.
            stand_in = document_ids(bags, getattr(self.tokenizer, "eos_id", None))
            _, labels, extra_inputs, extra_kwargs = super().post_dataloading_process(
                input_dict | {"input": stand_in}, labels
            )
            if self.parallel_dims.cp_enabled:
                positions = extra_kwargs["positions"].long()  # (B, l)
                bags = bags.take_along_dim(positions[..., None], dim=1)  # -> (B, l, s)
            batch = (bags, labels, extra_inputs, extra_kwargs)
        self.loss_fn.expect(batch[1])
        return batch

    @override
    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        if self.parallel_dims.pp_enabled:
            # Upstream's schedule goes backward from the sum and divides only what it logs
            # (pytorch/torchtitan#2972): gradients and their norm would be of another scale.
            self.loss_fn.divisor = kwargs["global_valid_tokens"]
            kwargs["global_valid_tokens"] = 1.0
        loss = super().forward_backward_step(**kwargs)
        self._losses.append(loss.detach())
        return loss

    def _before_optimizer_step(self, *args: Any) -> None:
        """The ranks tell each other of faults and of requests to stop, and act alike."""
        if self.job_config.comm.mode == "fake_backend":
            return  # what other ranks would have sent is whatever was in memory
        assert self._grad_norm is not None
        loss = torch.stack(self._losses).sum()
        if isinstance(loss, DTensor):  # with loss parallel
            loss = loss.full_tensor()
        where = f"step {self.step} ({self.schedule.phase(self.step)} phase)"
        stop = self.stop_request.signal != 0
        self.step_check.before_step(where, loss, self._grad_norm, stop)

    def _maximum_of_ranks(self, values: torch.Tensor) -> None:
        """In place, on the device."""
        if dist.get_world_size() > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)

    def _skipped_steps(self) -> int:
        self.step_check.settle()
        return self.step_check.skipped

    @property
    def stopping(self) -> bool:
        """Whether to end after this step, with a checkpoint; the same on all ranks."""
        return self.step_check.stop

    def share(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank. On the hosts: no device waits for it."""
        if self.host_group is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    @override
    def should_continue_training(self) -> bool:
        if self.stopping and super().should_continue_training():
            self.checkpointer.save_unless_saved(self.step)
            raise Stopped
        if self.stop_at_boundary and self.step >= self.schedule.boundary:
            self.checkpointer.wait()
            logger.info(
                f"Ends at the boundary, step {self.step} of {self.job_config.training.steps}"
            )
            return False
        return super().should_continue_training()

    @override
    def train(self) -> None:
        try:
            super().train()
            self.step_check.settle()  # where the data ended, or the phase
        except Stopped:
            self.share(None)  # every rank has come as far as this
            self.stop_request.ignore_signals()
            logger.warning(
                f"Stopped after step {self.step}, which has a checkpoint; launch again to go on"
            )
            self.close()
            dist.destroy_process_group()
            raise

    @override
    def close(self) -> None:
        super().close()
        self.stop_request.close()

    def manifest(self) -> dict[str, Any]:
        """What a checkpoint of now says of the run beside its states."""
        return {
            "phase": str(self.schedule.phase(self.step)),
            "data_tokens": self.data_tokens_seen(),
            "skipped_steps": self._skipped_steps(),
            "run": self.facts,
        }

    def data_tokens_seen(self) -> int:
        """Read so far on all ranks."""
        return self.ntokens_seen * self.dp_degree

    def restore(self, manifest: dict[str, Any]) -> None:
        """Take on what the states leave out or hold for another number of ranks."""
        self.ntokens_seen = manifest["data_tokens"] // self.dp_degree
        self.step_check.skipped = manifest["skipped_steps"]

    def batch_shape(self, step: int) -> BatchShape:
        """What a micro-batch reads and the transformer sees at ``step`` (from 1)."""
        training = self.job_config.training
        return self.schedule.batch_shape(step, training.local_batch_size, training.seq_len)

    def _set_flops_per_latent(self, shape: BatchShape) -> None:
        """Upstream counts FLOPs per token at training.seq_len; attention is cheaper below it.

        With pipeline parallelism there is no whole model left to count anew.
        """
        part = self.model_parts[0]
        counted, flops = (
            self.model_args.get_nparams_and_flops(part, length)[1]
            for length in (self._flops_length, shape.latents)
        )
        self.metrics_processor.num_flops_per_token += flops - counted
        self._flops_length = shape.latents

    def _announce(self) -> None:
        training, shape = self.job_config.training, self.batch_shape(1)
        logger.info(
            f"Superposition: bags of {self.schedule.bag_size} data tokens in steps 1 to "
            f"{self.schedule.boundary} of {training.steps} (mode {self.schedule.mode}); a sequence "
            f"is {shape.data_tokens} data tokens, {shape.latents} latents"
        )


@contextmanager
def _superposition_train_spec(job_config: JobConfig) -> Iterator[None]:
    """Our version of the model's train spec, where upstream's trainer looks first."""
    name, specs = job_config.model.name, train_spec_module._extra_train_specs
    registered = dict(specs)
    specs[name] = superposition_train_spec(train_spec_module.get_train_spec(name), job_config)
    try:
        yield
    finally:
        specs.clear()
        specs.update(registered)


def _write_config(job_config: JobConfig) -> None:
    """The resolved config, as TOML that starts the same run.

    TOML has no null: keys without a value are left out.
    """
    config = job_config.to_dict()
    del config["job"]["config_file"]
    path = Path(job_config.job.dump_folder, CONFIG_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(_without_none(config)))


def _without_none(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value is not None
    }


def _host_group(job_config: JobConfig) -> dist.ProcessGroup | None:
    """A group for small messages between the hosts; None if there is only this process."""
    if dist.get_world_size() == 1 or job_config.comm.mode != "default":
        return None
    return dist.new_group(backend="gloo")


@contextmanager
def _recorded_grad_norm(trainer: SuperpositionTrainer) -> Iterator[None]:
    """Have a step's gradient norm at hand before the optimizer's, where upstream has no hook."""
    clip = dist_utils.clip_grad_norm_

    @functools.wraps(clip)
    def clip_and_record(parameters: list[nn.Parameter], *args: Any, **kwargs: Any) -> torch.Tensor:
        add_up_partial_gradients(parameters)
        trainer._grad_norm = clip(parameters, *args, **kwargs)
        return trainer._grad_norm

    dist_utils.clip_grad_norm_ = clip_and_record  # type: ignore[assignment]
    try:
        yield
    finally:
        dist_utils.clip_grad_norm_ = clip  # type: ignore[assignment]
