"""The trainer of a dry run, which builds the model and runs steps on fake tensors."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from typing_extensions import override

from ..core import Stage
from ..data.workers import Batch
from ..training.trainer import SuperpositionTrainer
from ..upstream.fake import FakeTensorMode, PeakMemory
from ..upstream.fake_pipeline import begin_step
from ..upstream.names import train_spec_as
from ..upstream.stand_ins import TOKENIZER, attention_masks


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a rank at the peak of a step, in bytes.

    It is the memory that torch's allocator hands out. The CUDA context, NCCL's buffers and
    fragmentation are not in it.

    Attributes:
        peak: all memory.
        parameters: parameters: the shards, and what is gathered at that moment.
        gradients: gradients: the shards, and what is not yet reduced at that moment.
        optimizer: states of the optimizer.
        rest: activations, temporary tensors, buffers and inputs; DDP's buckets of gradients.
        pipeline_rank: rank of the pipeline that has this memory: the one that needs most.
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


def reduced(job_config: JobConfig, folder: str) -> JobConfig:
    """Return the job without what does not matter in a step, or cannot be simulated.

    Args:
        job_config: the job's config; it is not changed.
        folder: folder of the simulated run, which writes nothing there.
    """
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
    # overlapping runs threads without FakeTensorMode; without it, the order of steps is the same
    config.parallelism.pipeline_parallel_expert_parallel_overlap = False
    if config.activation_checkpoint.mode == "memory_budget":
        config.activation_checkpoint.mode = "none"
    return config


@contextlib.contextmanager
def simulated_train_spec(job_config: JobConfig) -> Iterator[None]:
    """Build the job's model on fake tensors in this context, without data.

    Args:
        job_config: the job's config.
    """
    name = job_config.model.name
    spec = train_spec_module.get_train_spec(name)
    with contextlib.ExitStack() as fake:

        def then_fake(build: Any) -> Any:
            def build_then_fake(*args: Any, **kwargs: Any) -> Any:
                built = build(*args, **kwargs)
                # only now: meshes needed values so far, and the parameters are on the meta device
                fake.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                return built

            return build_then_fake

        last = "parallelize_fn"
        if job_config.parallelism.pipeline_parallel_degree > 1:
            last = "pipelining_fn"  # it parallelizes each stage
        simulated: Any = dataclasses.replace(
            spec,
            model_args=copy.deepcopy(spec.model_args),  # upstream's trainer writes into them
            build_tokenizer_fn=None,
            build_dataloader_fn=_NoData,
        )
        simulated = dataclasses.replace(simulated, **{last: then_fake(getattr(spec, last))})
        fake.enter_context(train_spec_as(name, simulated))
        yield


class _NoData:
    """A loader without data."""

    def __init__(self, **kwargs: Any):
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class SimulatedTrainer(SuperpositionTrainer):
    """The trainer without what reads values of tensors, with a tracker of each step's memory."""

    tracker: PeakMemory
    gradient_accumulation_steps: int
    repeats = True  # whether to simulate few of a pipeline's micro-batches

    @override
    def check(self, job_config: JobConfig) -> None:
        pass  # the job's files need not exist here

    @override
    def run_facts(self) -> dict[str, Any]:
        return {}  # they are facts of files, which need not exist here

    @override
    def init_distributed(self) -> ParallelDims:
        layout = super().init_distributed()
        layout.build_mesh()  # needs values; on a single rank, the first step would build it
        return layout

    @override
    def before_optimizer_step(self, *args: Any) -> None:
        pass

    @override
    def _change_bag_size(self) -> None:
        pass

    @override
    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        if self.accumulates:  # it is a later micro-batch of the step
            self._fill_gradients()
            self.tracker.track_external(*self.model_parts)
        return super().forward_backward_step(**kwargs)

    def prepare(self) -> None:
        """Create the optimizer's states, and keep the trainer from reading values in a step."""
        self.device = torch.device("cpu")  # to a fake tensor, "cpu:0" is another device
        self.tokenizer = TOKENIZER
        for part in self.model_parts:
            model: Any = part
            model.get_attention_masks = attention_masks(self.model_args, model)
        self.metrics_processor.should_log = lambda step: False  # type: ignore[method-assign]
        self.accumulates = self.gradient_accumulation_steps > 1
        self.gradient_accumulation_steps = 1
        self._fill_gradients()
        self.optimizers.step()
        self.optimizers.zero_grad()

    def _fill_gradients(self) -> None:
        for parameter in (p for part in self.model_parts for p in part.parameters()):
            parameter.grad = torch.zeros_like(parameter)

    def simulate(self) -> dict[Stage, Memory]:
        """Simulate the last step of recovery and of each stage.

        Steps that are alike are simulated once: stages of the same bag size, and in the middle of a
        pipeline all steps with the same number of latents.

        Returns:
            The memory of recovery and of one stage of each bag size.
        """
        stages = self.schedule.until(self.job_config.training.steps)
        each_bag_size = {stage.bag_size: stage for stage in stages}
        simulated: dict[Any, Memory] = {}
        memory = {}
        for bag_size, stage in each_bag_size.items():
            kind: Any = bag_size
            if self.parallel_dims.pp_enabled and not (
                self.pp_has_first_stage or self.pp_has_last_stage
            ):
                shape = self.batch_shape(stage.last)
                kind = shape.sequences, shape.latents
            if kind not in simulated:
                simulated[kind] = self._simulate_step(stage.last)
            memory[stage] = simulated[kind]
        return memory

    def _simulate_step(self, step: int) -> Memory:
        self.step, self.tracker = step, PeakMemory()
        shape = self.batch_shape(step)

        def batches() -> Iterator[Batch]:
            while True:
                tokens = torch.zeros(shape.sequences, shape.data_tokens, dtype=torch.int64)
                yield {"input": tokens}, torch.zeros_like(tokens)

        if self.parallel_dims.pp_enabled:
            self._begin_pipeline(shape.latents)
        self.tracker.track_external(*self.model_parts, *self.optimizers.optimizers)
        with self.tracker:
            self.train_step(batches())
        self.optimizers.zero_grad()
        peak, kinds = self.tracker.peak()
        rank = 0
        if self.parallel_dims.pp_enabled:
            rank = self.parallel_dims.get_mesh("pp").get_local_rank()
        return Memory(peak, kinds["PARAM"], kinds["GRAD"], kinds["OPT"], rank)

    def _begin_pipeline(self, latents: int) -> None:
        """Tell a pipeline's stages the shapes of inputs and outputs, given ``latents``."""
        layout, training = self.parallel_dims, self.job_config.training
        size = self.job_config.parallelism.pipeline_parallel_microbatch_size
        length = latents // layout.cp
        tokens = torch.empty(size, length, dtype=torch.int64, device="meta")
        precision = training.mixed_precision_param if layout.fsdp_enabled else training.dtype
        hidden = torch.empty(
            # under tensor parallelism, each rank has a part of the sequence between layers
            (size, length // layout.tp, self.model_args.dim),
            dtype=TORCH_DTYPE_MAP[precision],
            device="meta",
            requires_grad=True,
        )
        begin_step(self.pp_schedule, self.tracker, tokens, hidden, self.repeats)
