"""The training loop's two phases: what upstream's trainer does differently in superposition.

A superposition step: the loader gives sequences of s * L data tokens, they are folded into bags,
the loss is normalised over all ranks and accumulation steps. In recovery, and without a
``[superposition]`` section, every step is upstream's own.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
import torch
import torch.distributed as dist
import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer
from typing_extensions import override

from .checkpoint import BoundaryCheckpointManager
from .core import IGNORE_INDEX, BatchShape, Phase, Schedule, fold
from .data.loader import check_workers, set_seq_len
from .job_checks import check_job
from .job_config import build_schedule, superposition_section
from .reinit import reinitialize
from .train_spec import PhaseLoss, superposition_train_spec

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]

CONFIG_FILE = "config.toml"


class SuperpositionTrainer(Trainer):
    """Upstream's trainer with a superposition phase before the ordinary one.

    Raises:
        ConfigError: from the constructor, before a process group or a device is touched, for a
            job config that cannot run.
    """

    schedule: Schedule

    def __init__(self, job_config: JobConfig):
        check_job(job_config)
        self.schedule = build_schedule(job_config)
        with _superposition_train_spec(job_config.model.name):
            super().__init__(job_config)
        check_workers(self.dataloader)
        if dist.get_rank() == 0:
            _write_config(job_config)
        if self.schedule.enabled:
            if job_config.checkpoint.enable:
                BoundaryCheckpointManager.adopt(self.checkpointer, self.schedule.boundary)
            else:
                logger.warning("checkpoint.enable = false: there will be no boundary checkpoint")
            self._announce()
        elif self.schedule.bag_size > 1:
            logger.warning("No step is in superposition: its share of training.steps rounds to 0")

    @override
    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """Micro-batches of data tokens, shaped for the phase of the current step."""
        if not self.schedule.enabled:
            yield from super().batch_generator(data_iterable)
            return
        shape = None
        while True:
            previous, shape = shape, self.batch_shape(self.step)
            if previous is None or shape.data_tokens != previous.data_tokens:
                set_seq_len(data_iterable, shape.data_tokens)
                batches = super().batch_generator(data_iterable)
            if shape != previous:
                self._set_flops_per_latent(shape)
            input_dict, labels = _concatenate([next(batches) for _ in range(shape.loader_batches)])
            self.metrics_processor.count_batch(
                data_tokens=labels.numel(), latents=shape.sequences * shape.latents
            )
            yield input_dict, labels

    @override
    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        if self.schedule.phase(self.step) is Phase.SUPERPOSITION:
            data_iterator = iter(self._fold_step(data_iterator))
        elif self.schedule.enabled and self.step == self.schedule.boundary + 1:
            self._enter_recovery()
        super().train_step(data_iterator)

    def _fold_step(self, data_iterator: Iterator[Batch]) -> list[Batch]:
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
        loss_fn = self.loss_fn
        assert isinstance(loss_fn, PhaseLoss)
        counts = torch.stack([loss_fn.bag_loss.counts(batch) for batch in labels]).sum(0)
        targets = torch.stack([(batch != IGNORE_INDEX).sum() for batch in labels]).sum(0, True)
        total = torch.cat([counts, targets]).to(self.device)
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(total, group=self.parallel_dims.get_mesh("batch").get_group())
        counts, targets = total[:-1], total[-1]
        loss_fn.coefficients = (loss_fn.bag_loss.coefficients(counts) * targets).float()

    def _enter_recovery(self) -> None:
        """Before the first recovery step, in this launch or in one resumed at the boundary."""
        logger.info(f"Boundary: {self.schedule.boundary} superposition steps done, recovery begins")
        if names := superposition_section(self.job_config).reinit_at_recovery:
            logger.info(f"Initialising {', '.join(names)} afresh")
            self.checkpointer.maybe_wait_for_staging()  # of the boundary checkpoint
            seed = (self.job_config.debug.seed or 0) + self.schedule.boundary
            reinitialize(self.model_parts, names, self.optimizers, seed)

    def batch_shape(self, step: int) -> BatchShape:
        """What a micro-batch reads and the transformer sees at ``step`` (from 1)."""
        training = self.job_config.training
        return self.schedule.batch_shape(step, training.local_batch_size, training.seq_len)

    def _set_flops_per_latent(self, shape: BatchShape) -> None:
        """Upstream counts FLOPs per token at training.seq_len; attention is cheaper below it."""
        _, self.metrics_processor.num_flops_per_token = self.model_args.get_nparams_and_flops(
            self.model_parts[0], shape.latents
        )

    def _announce(self) -> None:
        training, shape = self.job_config.training, self.batch_shape(1)
        logger.info(
            f"Superposition: bags of {self.schedule.bag_size} data tokens in steps 1 to "
            f"{self.schedule.boundary} of {training.steps} (mode {self.schedule.mode}); a sequence "
            f"is {shape.data_tokens} data tokens, {shape.latents} latents"
        )


@contextmanager
def _superposition_train_spec(name: str) -> Iterator[None]:
    """Our version of the model's train spec, where upstream's trainer looks first."""
    specs, spec = train_spec_module._extra_train_specs, train_spec_module.get_train_spec(name)
    registered = dict(specs)
    specs[name] = superposition_train_spec(spec)
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


def _concatenate(batches: list[Batch]) -> Batch:
    """One batch of all sequences: k times (B, T) -> (k*B, T)."""
    if len(batches) == 1:
        return batches[0]
    inputs = {key: torch.cat([inputs[key] for inputs, _ in batches]) for key in batches[0][0]}
    return inputs, torch.cat([labels for _, labels in batches])
