"""A job's steps without its hardware: the real trainer on tensors without content.

One process plays rank 0 of any number of ranks. Meshes, sharding, optimizer and steps are the
trainer's own; only the values are missing (torch's ``FakeTensorMode``), so that a model of any size
is built in seconds and every allocation of a step can be added up.
"""

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from typing_extensions import override

from ..checks.job import check_config
from ..checks.model import model_args_of
from ..core import Stage
from ..data.loader import Batch
from ..errors import in_one_line
from ..training.trainer import SuperpositionTrainer
from ..upstream.fake import FakeTensorMode, PeakMemory
from ..upstream.isolation import own_state
from ..upstream.names import train_spec_as
from ..upstream.stand_ins import TOKENIZER, attention_masks, stand_ins


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
        pipeline_rank: the rank of the pipeline that needs this memory, the one that needs most.
    """

    peak: int
    parameters: int
    gradients: int
    optimizer: int
    pipeline_rank: int = 0

    @property
    def rest(self) -> int:
        """Activations, temporary tensors, buffers and inputs."""
        return self.peak - self.parameters - self.gradients - self.optimizer


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    Attributes:
        mesh: size of each dimension of the layout that is not 1.
        accumulation: micro-batches in a step.
        memory: of a step of each stage and of recovery; empty where steps are not played. Routers
            give each expert the same number of tokens.
        worst_case: the same if routers send as many tokens as they can to one rank's experts; empty
            where that changes nothing, because ranks do not share experts.
        untraced: why they cannot be; "" if they can.
        left_out: keys of the job that the memory does not take into account.
    """

    mesh: dict[str, int]
    accumulation: int
    memory: dict[Stage, Memory]
    worst_case: dict[Stage, Memory]
    untraced: str
    left_out: tuple[str, ...]


def dry_run(job_config: JobConfig, ranks: int, play: bool = True) -> DryRun:
    """Build a job on ``ranks`` ranks, and ``play`` a step of each of its stages and of recovery.

    To be called in a process without a process group, after ``enable_cpu_if_alone`` on a machine
    without, or with hidden, accelerators. Steps are eager and in high precision: it applies neither
    torch.compile, which usually needs fewer temporary tensors, nor model converters. Two
    micro-batches stand for any number.

    Raises:
        ConfigError: for a config that cannot run.
    """
    check_config(job_config, ranks)
    model_args = model_args_of(job_config)
    with (
        own_state(job_config, ranks),
        stand_ins(model_args),
        _played_train_spec(job_config),
        tempfile.TemporaryDirectory() as folder,
    ):
        trainer = _DryRunTrainer(_reduced(job_config, folder))
        layout = trainer.parallel_dims
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
        accumulation = trainer.gradient_accumulation_steps
        untraced, memory = _untraced(job_config, layout), {}
        if play and not untraced:
            try:
                memory = trainer.play()
            except Exception as error:  # it has been built, and so may well train
                untraced = f"memory could not be estimated: {in_one_line(error)}"
        trainer.close()
    return DryRun(
        mesh={name: size for name in names if (size := getattr(layout, name)) > 1},
        accumulation=accumulation,
        memory=memory,
        worst_case={},
        untraced=untraced,
        left_out=("model.converters",) if job_config.model.converters else (),
    )


def _untraced(job_config: JobConfig, layout: ParallelDims) -> str:
    """Why memory cannot be estimated; "" if it can."""
    for name, enabled in (
        ("expert", layout.ep_enabled),
        ("pipeline", layout.pp_enabled),
        ("context", layout.cp_enabled),
    ):
        if enabled:
            return f"memory is not estimated with parallelism.{name}_parallel_degree above 1"
    if layout.dp_replicate_enabled and not layout.fsdp_enabled:
        return "memory is not estimated under DDP, parallelism.data_parallel_shard_degree = 1"
    for key, applies in (
        ("training.enable_cpu_offload", job_config.training.enable_cpu_offload),
        (
            'activation_checkpoint.mode = "memory_budget", which torch.compile carries out',
            job_config.activation_checkpoint.mode == "memory_budget",
        ),
        (
            "checkpoint.create_seed_checkpoint, which takes no steps",
            job_config.checkpoint.create_seed_checkpoint,
        ),
    ):
        if applies:
            return f"memory is not estimated with {key}"
    return ""


def _reduced(job_config: JobConfig, folder: str) -> JobConfig:
    """Return the job without what has no part in a step, or is not played."""
    config = copy.deepcopy(job_config)
    config.job.dump_folder = folder
    config.comm.mode = "fake_backend"
    config.model.converters = []
    config.checkpoint.enable = config.checkpoint.create_seed_checkpoint = False
    config.validation.enable = config.compile.enable = False
    config.metrics.enable_tensorboard = config.metrics.enable_wandb = False
    config.training.enable_cpu_offload = config.training.gc_debug = False
    config.debug.deterministic = config.activation_checkpoint.debug = False
    config.parallelism.enable_async_tensor_parallel = False
    config.parallelism.expert_parallel_comm_backend = "standard"
    if config.activation_checkpoint.mode == "memory_budget":
        config.activation_checkpoint.mode = "none"
    return config


@contextlib.contextmanager
def _played_train_spec(job_config: JobConfig) -> Iterator[None]:
    """Have the model built on fake tensors, from model args of its own, without data."""
    name = job_config.model.name
    spec = train_spec_module.get_train_spec(name)
    with contextlib.ExitStack() as fake:

        def then_fake(build: Any) -> Any:
            def build_then_fake(*args: Any, **kwargs: Any) -> Any:
                built = build(*args, **kwargs)
                # so far meshes have needed values, and the parameters are on the meta device
                fake.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                return built

            return build_then_fake

        last = "parallelize_fn"
        if job_config.parallelism.pipeline_parallel_degree > 1:
            last = "pipelining_fn"  # which parallelizes each stage
        played: Any = dataclasses.replace(
            spec,
            model_args=copy.deepcopy(spec.model_args),  # upstream's trainer writes into them
            build_tokenizer_fn=None,
            build_dataloader_fn=_NoData,
        )
        played = dataclasses.replace(played, **{last: then_fake(getattr(spec, last))})
        fake.enter_context(train_spec_as(name, played))
        yield


class _NoData:
    """A loader without data."""

    def __init__(self, **kwargs: Any):
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _DryRunTrainer(SuperpositionTrainer):
    """The trainer without what reads values, with a tracker of the step at hand."""

    tracker: PeakMemory
    gradient_accumulation_steps: int

    @override
    def check(self, job_config: JobConfig) -> None:
        pass  # its files need not be here

    @override
    def run_facts(self) -> dict[str, Any]:
        return {}  # of files that need not be here

    @override
    def init_distributed(self) -> ParallelDims:
        layout = super().init_distributed()
        layout.build_mesh()  # needs values; on a single rank it would be built in the first step
        return layout

    @override
    def before_optimizer_step(self, *args: Any) -> None:
        pass

    @override
    def _change_bag_size(self) -> None:
        pass

    @override
    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        loss = super().forward_backward_step(**kwargs)
        self.tracker.reset_mod_stats()  # or it refuses the next forward
        return loss

    def play(self) -> dict[Stage, Memory]:
        """The last step of recovery and of each stage; of one for stages of the same bag size."""
        self.device = torch.device("cpu")  # "cpu:0" is another to a fake tensor
        self.tokenizer = TOKENIZER
        model: Any = self.model_parts[0]
        model.get_attention_masks = attention_masks(self.model_args, model)
        self.metrics_processor.should_log = lambda step: False  # type: ignore[method-assign]
        self.gradient_accumulation_steps = min(2, self.gradient_accumulation_steps)
        for parameter in (p for part in self.model_parts for p in part.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        self.optimizers.step()  # which creates its states
        self.optimizers.zero_grad()
        stages = self.schedule.until(self.job_config.training.steps)
        each_bag_size = {stage.bag_size: stage for stage in stages}
        return {stage: self._play_step(stage.last) for stage in each_bag_size.values()}

    def _play_step(self, step: int) -> Memory:
        self.step, self.tracker = step, PeakMemory()
        shape = self.batch_shape(step)

        def batches() -> Iterator[Batch]:
            while True:
                tokens = torch.zeros(shape.sequences, shape.data_tokens, dtype=torch.int64)
                yield {"input": tokens}, torch.zeros_like(tokens)

        self.tracker.track_external(*self.model_parts, *self.optimizers.optimizers)
        with self.tracker:
            self.train_step(batches())
        self.optimizers.zero_grad()
        peak, kinds = self.tracker.peak()
        return Memory(peak, kinds["PARAM"], kinds["GRAD"], kinds["OPT"])
