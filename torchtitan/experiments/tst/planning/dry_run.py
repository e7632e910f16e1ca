"""A job's steps without its hardware: the real trainer on tensors without content.

One process plays rank 0 of any number of ranks. Meshes, sharding, optimizer and both phases' steps
are the trainer's own; only the values are missing (torch's ``FakeTensorMode``), so that a model of
any size is built in seconds and every allocation of a step can be added up.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torchtitan.protocols.train_spec as train_spec_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import _TOTAL_KEY, MemTracker
from torch.distributed.tensor import _random as dtensor_random
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.experimental._attention import (
    _disable_context_parallel_dispatcher,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import _disable_current_modes
from torchtitan.config import JobConfig, Model
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.moe import kernels as moe_kernels
from torchtitan.models.moe import moe
from torchtitan.models.moe import utils as moe_utils
from torchtitan.models.moe.kernels import generate_permute_indices
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.logging import logger
from typing_extensions import override

from ..core import Phase, embedding, losses
from ..data.loader import Batch
from ..job_checks import check_config, model_args_of
from ..trainer import SuperpositionTrainer


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of rank 0 at its fullest moment in a step, in bytes.

    What torch's allocator hands out; the CUDA context, NCCL's buffers and fragmentation come on
    top.

    Attributes:
        peak: all of it.
        parameters: sharded, and gathered at that moment.
        gradients: sharded, and not yet reduced at that moment.
        optimizer: its states.
        rest: activations, temporary tensors, buffers and inputs.
    """

    peak: int
    parameters: int
    gradients: int
    optimizer: int

    @property
    def rest(self) -> int:
        """Activations, temporary tensors, buffers and inputs."""
        return self.peak - self.parameters - self.gradients - self.optimizer


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What came of it.

    Attributes:
        mesh: size of each dimension of the layout that is not 1.
        accumulation: micro-batches in a step.
        memory: of a step of each phase that the run has; empty where steps are not played.
        untraced: why they cannot be; "" if they can.
        stand_ins: what the memory is that of, in the place of what the job has; "" without.
    """

    mesh: dict[str, int]
    accumulation: int
    memory: dict[Phase, Memory]
    untraced: str
    stand_ins: str


def dry_run(job_config: JobConfig, ranks: int, play: bool = True) -> DryRun:
    """Build a job on ``ranks`` ranks, and ``play`` a step of each of its phases.

    To be called in a process without a process group, after ``enable_cpu_if_alone`` on a machine
    without, or with hidden, accelerators. Steps are eager: torch.compile is left out, which fuses
    away temporary tensors as a rule. Two micro-batches stand for any number.

    Raises:
        ConfigError: for a config that cannot run.
    """
    check_config(job_config, ranks)
    stand_ins = _stand_ins(job_config)
    with _without_values(job_config.model, ranks), tempfile.TemporaryDirectory() as folder:
        trainer = _DryRunTrainer(_reduced(job_config, folder))
        layout = trainer.parallel_dims
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
        untraced = _untraced(layout, job_config)
        result = DryRun(
            mesh={name: size for name in names if (size := getattr(layout, name)) > 1},
            accumulation=trainer.gradient_accumulation_steps,
            memory=trainer.play() if play and not untraced else {},
            untraced=untraced,
            stand_ins=stand_ins,
        )
        trainer.close()
        return result


def _untraced(layout: ParallelDims, job_config: JobConfig) -> str:
    for name, enabled in (
        ("expert", layout.ep_enabled),
        ("pipeline", layout.pp_enabled),
        ("context", layout.cp_enabled),
    ):
        if enabled:
            return f"memory is not estimated with parallelism.{name}_parallel_degree above 1"
    if layout.dp_replicate_enabled and not layout.fsdp_enabled:
        return "memory is not estimated under DDP, parallelism.data_parallel_shard_degree = 1"
    if job_config.training.enable_cpu_offload:
        return "memory is not estimated with training.enable_cpu_offload"
    if job_config.activation_checkpoint.mode == "memory_budget":
        return 'memory is not estimated with activation_checkpoint.mode = "memory_budget"'
    return ""


def _stand_ins(job_config: JobConfig) -> str:
    """In words, what :func:`_reduced` and :func:`_args_of_sdpa` put in another's place."""
    found = []
    if converters := [name for name in job_config.model.converters if _quantizes(name)]:
        found.append(f"without {', '.join(converters)}")
    if (attention := _attention(model_args_of(job_config))) in _MASKED:
        found.append(f"{attention} attention as SDPA")
    return ", ".join(found)


_MASKED = ("flex", "varlen")  # kinds of attention; their kernels keep what that of SDPA keeps


def _attention(model_args: BaseModelArgs) -> str:
    return getattr(model_args, "attn_type", "sdpa")


def _args_of_sdpa(model_args: BaseModelArgs) -> BaseModelArgs:
    """A copy with a kind of attention whose kernel fake tensors have."""
    args: Any = copy.deepcopy(model_args)
    if _attention(args) in _MASKED:
        args.attn_type, args.attn_mask_type = "sdpa", "causal"
    return args


def _quantizes(converter: str) -> bool:
    return converter.startswith("quantize.")


def _reduced(job_config: JobConfig, folder: str) -> JobConfig:
    """The job without what has no part in a step, or what only a GPU or a compiler does."""
    config = copy.deepcopy(job_config)
    config.job.dump_folder, config.job.save_config_file = folder, None
    config.comm.mode = "fake_backend"
    config.checkpoint.enable = config.checkpoint.create_seed_checkpoint = False
    config.validation.enable = config.compile.enable = False
    config.metrics.enable_tensorboard = config.metrics.enable_wandb = False
    config.debug.deterministic = config.training.gc_debug = False
    config.training.enable_cpu_offload = config.parallelism.enable_async_tensor_parallel = False
    config.model.converters = [name for name in config.model.converters if not _quantizes(name)]
    if config.activation_checkpoint.mode == "memory_budget":
        config.activation_checkpoint.mode = "none"
    return config


@contextlib.contextmanager
def _without_values(model: Model, ranks: int) -> Iterator[None]:
    """What takes values of tensors, or kernels that have no fake, replaced; and put back."""
    spec = train_spec_module.get_train_spec(model.name)

    def become_fake() -> None:
        # until now meshes have needed values, and the parameters are on the meta device
        fake: Any = FakeTensorMode(allow_non_fake_inputs=True)
        patches.enter_context(fake)

    def parallelize(model: torch.nn.Module, layout: ParallelDims, *args: Any) -> torch.nn.Module:
        parallel_model = spec.parallelize_fn(model, layout, *args)
        if not layout.pp_enabled:
            become_fake()
        return parallel_model

    def pipeline(*args: Any) -> Any:
        assert spec.pipelining_fn is not None
        stages = spec.pipelining_fn(*args)
        become_fake()
        return stages

    fake_spec = dataclasses.replace(
        spec,
        model_args={model.flavor: _args_of_sdpa(spec.model_args[model.flavor])},
        build_tokenizer_fn=None,
        build_dataloader_fn=_NoData,
        parallelize_fn=parallelize,
        pipelining_fn=pipeline if spec.pipelining_fn else None,
    )
    environment = {"NGPU": str(ranks), "WORLD_SIZE": str(ranks), "RANK": "0", "LOCAL_RANK": "0"}
    level = logger.level
    _clear_sharding_prop_cache()  # which has meshes in it
    replaced: tuple[Any, ...] = (
        mock.patch.dict(os.environ, environment),
        mock.patch.dict(train_spec_module._extra_train_specs, {model.name: fake_spec}),
        mock.patch.object(dtensor_random, "_rng_tracker", None),
        *(
            mock.patch.object(owner, name, _with_values(getattr(owner, name)))
            for owner, name in _OF_SHAPES
        ),
        mock.patch.object(torch.nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor),
        mock.patch.object(torch, "histc", lambda ids, bins, **_: ids.new_empty(bins)),
        mock.patch.object(moe, "_run_experts_for_loop", moe._run_experts_grouped_mm),
        mock.patch.object(moe_utils, "generate_permute_indices", generate_permute_indices),
        mock.patch.object(moe_kernels, "fill_indices_wrapper", _fill_indices),
        mock.patch.object(dist_utils, "dist_sum", lambda *_, **__: 1.0),
        # fake tensors are on the CPU and stand for an accelerator's
        mock.patch.object(losses, "_BLOCK_OF_CPU", losses._BLOCK_OF_ACCELERATOR),
        mock.patch.object(embedding, "_MeanOnCPU", _MeanOnAccelerator),
        warnings.catch_warnings(),
    )
    with contextlib.ExitStack() as patches:
        for patch in replaced:
            patches.enter_context(patch)
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
            gc.enable()  # upstream's trainer collects when it likes
            _disable_context_parallel_dispatcher()
            _clear_sharding_prop_cache()
            if dist.is_initialized():
                dist.destroy_process_group()


# methods of DTensor that find out shapes and offsets, by tensors that take no memory of a GPU
_OF_SHAPES = (
    (ShardingPropagator, "_propagate_tensor_meta_non_cached"),
    (_StridedShard, "local_shard_size_and_offset"),
)


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, on tensors that have values and that no tracker counts."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


class _MeanOnAccelerator:
    @staticmethod
    def apply(bags: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding_bag(bags, weight, mode="mean")


def _fill_indices(
    tokens_per_expert: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    experts_per_rank: int,
    num_ranks: int,
    max_len: int,
    **kwargs: Any,
) -> torch.Tensor:
    """In the place of upstream's triton kernel, which needs a GPU."""
    return tokens_per_expert.new_empty(max_len, dtype=torch.int32)


class _NoData:
    """In the place of the loader."""

    def __init__(self, **kwargs: Any):
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _PeakMemory(MemTracker):
    """Torch's tracker, without its peaks for each module, which take ten times as long."""

    @override
    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, snapshot in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < snapshot[_TOTAL_KEY]:
                self._peak_mem[device] = snapshot[_TOTAL_KEY]
                self._peak_mem_snap[device] = dict(snapshot)

    def peak(self) -> Memory:
        """The fullest moment so far."""
        (snapshot,) = self.get_tracker_snapshot("peak").values()
        kinds = {getattr(kind, "name", kind): size for kind, size in snapshot.items()}
        return Memory(kinds[_TOTAL_KEY], kinds["PARAM"], kinds["GRAD"], kinds["OPT"])


class _DryRunTrainer(SuperpositionTrainer):
    """The trainer without what reads values, with a tracker of the step at hand."""

    tracker: _PeakMemory
    gradient_accumulation_steps: int

    @override
    def check(self, job_config: JobConfig) -> None:
        pass  # its files need not be here

    @override
    def init_distributed(self) -> ParallelDims:
        layout = super().init_distributed()
        layout.build_mesh()  # needs values; on a single rank it would be built in the first step
        return layout

    @override
    def _before_optimizer_step(self, *args: Any) -> None:
        pass

    @override
    def _enter_recovery(self) -> None:
        pass

    @override
    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        loss = super().forward_backward_step(**kwargs)
        self.tracker.reset_mod_stats()  # or it refuses the next forward
        return loss

    def play(self) -> dict[Phase, Memory]:
        """The last step of each phase."""
        self.device = torch.device("cpu")  # "cpu:0" is another to a fake tensor
        self.metrics_processor.should_log = lambda step: False  # type: ignore[method-assign]
        self.gradient_accumulation_steps = min(2, self.gradient_accumulation_steps)
        for parameter in (p for part in self.model_parts for p in part.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        self.optimizers.step()  # which creates its states
        self.optimizers.zero_grad()
        steps = {Phase.RECOVERY: self.job_config.training.steps}
        if self.schedule.enabled:
            steps = {Phase.SUPERPOSITION: self.schedule.boundary} | steps
        return {phase: self._play_step(step) for phase, step in steps.items()}

    def _play_step(self, step: int) -> Memory:
        self.step, self.tracker = step, _PeakMemory()
        shape = self.batch_shape(step)

        def batches() -> Iterator[Batch]:
            while True:
                tokens = torch.zeros(shape.sequences, shape.data_tokens, dtype=torch.int64)
                yield {"input": tokens}, torch.zeros_like(tokens)

        self.tracker.track_external(*self.model_parts, *self.optimizers.optimizers)
        with self.tracker:
            self.train_step(batches())
        self.optimizers.zero_grad()
        return self.tracker.peak()
