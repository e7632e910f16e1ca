"""The trainer of a dry run: it is built, and plays steps, on tensors without content."""

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
from ..data.loader import Batch
from ..training.trainer import SuperpositionTrainer
from ..upstream.fake import FakeTensorMode, PeakMemory
from ..upstream.fake_pipeline import begin_step
from ..upstream.names import train_spec_as
from ..upstream.stand_ins import TOKENIZER, attention_masks


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a rank at its fullest moment in a step, in bytes.

    What torch's allocator hands out; the CUDA context, NCCL's buffers and fragmentation come on
    top.

    Attributes:
        peak: all of it.
        parameters: sharded, and gathered at that moment.
        gradients: sharded, and not yet reduced at that moment.
        optimizer: its states.
        rest: activations, temporary tensors, buffers and inputs; DDP's buckets of gradients.
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


def reduced(job_config: JobConfig, folder: str) -> JobConfig:
    """Return the job without what has no part in a step, or is not played.

    Args:
        job_config: of the job, which stays as it is.
        folder: of the run that writes nothing.
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
    # overlapping takes threads, which have no modes of tensors; without, the order is the same
    config.parallelism.pipeline_parallel_expert_parallel_overlap = False
    if config.activation_checkpoint.mode == "memory_budget":
        config.activation_checkpoint.mode = "none"
    return config


@contextlib.contextmanager
def played_train_spec(job_config: JobConfig) -> Iterator[None]:
    """Have the model built on fake tensors, from model args of its own, without data.

    Args:
        job_config: whose model it is.
    """
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


class PlayedTrainer(SuperpositionTrainer):
    """The trainer without what reads values, with a tracker of the step at hand."""

    tracker: PeakMemory
    gradient_accumulation_steps: int
    repeats = True  # whether to play few of a pipeline's micro-batches

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
        if self.accumulates:  # it is a later micro-batch of the step
            self._fill_gradients()
            self.tracker.track_external(*self.model_parts)
        return super().forward_backward_step(**kwargs)

    def prepare(self) -> None:
        """Make the states of the optimizer, and have the trainer read no values in a step."""
        self.device = torch.device("cpu")  # "cpu:0" is another to a fake tensor
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

    def play(self) -> dict[Stage, Memory]:
        """Play the last step of recovery and of each stage; of one of stages of one bag size.

        In the middle of a pipeline, steps of the same latents are alike, and one is played.
        """
        stages = self.schedule.until(self.job_config.training.steps)
        each_bag_size = {stage.bag_size: stage for stage in stages}
        played: dict[Any, Memory] = {}
        memory = {}
        for bag_size, stage in each_bag_size.items():
            kind: Any = bag_size
            if self.parallel_dims.pp_enabled and not (
                self.pp_has_first_stage or self.pp_has_last_stage
            ):
                shape = self.batch_shape(stage.last)
                kind = shape.sequences, shape.latents
            if kind not in played:
                played[kind] = self._play_step(stage.last)
            memory[stage] = played[kind]
        return memory

    def _play_step(self, step: int) -> Memory:
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
        """Tell the stages of a pipeline what they take and give, for sequences of ``latents``."""
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
