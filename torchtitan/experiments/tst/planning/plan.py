"""The plan of a run, from its config alone: steps, tokens, FLOPs, hours and data."""

from dataclasses import dataclass

from torchtitan.config import JobConfig

from .. import paper
from ..checks.model import model_on_meta
from ..config.job_config import token_shards_section
from ..config.layout import dp_degree, global_batch_size, ranks_of_layout
from ..config.schedule import build_schedule
from ..config.values import check_values
from ..core import Stage
from ..data.shards.loader import is_token_shards, open_mixture, tokens_to_read
from ..data.shards.token_shards import ShardError
from .numbers import batch_in_words


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: name on the command line.
        peak_flops: peak of dense bfloat16 FLOPs per second, as in upstream's MFU.
        memory: bytes of memory.
        nvlink: bytes per second that it receives from GPUs of its node, by its maker's figures.
        network: bytes per second that it receives from other nodes, with one network card each.
    """

    name: str
    peak_flops: float
    memory: float
    nvlink: float = 450e9
    network: float = 50e9


# Upstream's table of peaks (tools.utils.get_peak_flops) is not used: it also looks at this machine.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312e12, 80e9, 300e9, 25e9),
        Gpu("H100", 989e12, 80e9),
        Gpu("H200", 989e12, 141e9),
        Gpu("B200", 2.25e15, 180e9, 900e9),
    )
}


@dataclass(frozen=True)
class StagePlan:
    """One stage of superposition, or recovery.

    Attributes:
        stage: the stage.
        data_tokens_per_step: data tokens that all ranks read.
        latents_per_step: positions that the transformer sees on all ranks.
        flops_per_step: FLOPs of forward and backward on all ranks, as upstream counts them.
    """

    stage: Stage
    data_tokens_per_step: int
    latents_per_step: int
    flops_per_step: float

    @property
    def steps(self) -> int:
        """Number of its steps."""
        return self.stage.steps

    @property
    def data_tokens(self) -> int:
        """Data tokens read in all its steps."""
        return self.steps * self.data_tokens_per_step

    @property
    def latents(self) -> int:
        """Latents in all its steps."""
        return self.steps * self.latents_per_step

    @property
    def flops(self) -> float:
        """FLOPs of all its steps."""
        return self.steps * self.flops_per_step


@dataclass(frozen=True)
class Plan:
    """The plan of a run: its steps, tokens and FLOPs.

    Attributes:
        ranks: number of GPUs.
        parameters: total number of parameters of the model.
        sequences: sequences in an ordinary step: data-parallel ranks x local batch x accumulation.
        data_parallel_ranks: number of data-parallel ranks.
        local_batch_size: sequences in a micro-batch.
        stages: the stages of superposition in order, and recovery as the last.
        tokens_needed: data tokens taken from the sources: one more than read for each sequence.
    """

    ranks: int
    parameters: int
    sequences: int
    data_parallel_ranks: int
    local_batch_size: int
    stages: tuple[StagePlan, ...]
    tokens_needed: int

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return sum(stage.steps for stage in self.stages)

    @property
    def data_tokens(self) -> int:
        """Data tokens of the whole run."""
        return sum(stage.data_tokens for stage in self.stages)

    @property
    def latents(self) -> int:
        """Latents of the whole run."""
        return sum(stage.latents for stage in self.stages)

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return sum(stage.flops for stage in self.stages)

    @property
    def superposition(self) -> tuple[StagePlan, ...]:
        """The stages of superposition."""
        return self.stages[:-1]

    @property
    def recovery(self) -> StagePlan:
        """The recovery phase."""
        return self.stages[-1]

    @property
    def mean_bag_size(self) -> float:
        """Mean bag size over the steps of superposition; 1 without any."""
        stages = [planned.stage for planned in self.superposition]
        tokens = sum(stage.steps * stage.bag_size for stage in stages)
        return tokens / sum(stage.steps for stage in stages) if stages else 1

    @property
    def batch(self) -> str:
        """The sequences of an ordinary step, in words."""
        return batch_in_words(self.sequences, self.data_parallel_ranks, self.local_batch_size)

    def gpu_hours(self, gpu: Gpu, mfu: float) -> float:
        """Return the GPU hours at an MFU in (0, 1]."""
        return self.flops / (gpu.peak_flops * mfu * 3600)


def default_ranks(job_config: JobConfig) -> int:
    """Return the number of GPUs of the config's layout, or the least if it takes all there are.

    Raises:
        ConfigError: for a value that its key does not allow.
    """
    check_values(job_config)
    return ranks_of_layout(job_config)[0]


def make_plan(job_config: JobConfig, ranks: int) -> Plan:
    """Return the plan of a config that has passed :func:`..checks.job.check_config`.

    Raises:
        ConfigError: if TorchTitan refuses to build the model.
    """
    training, schedule = job_config.training, build_schedule(job_config)
    degree = dp_degree(job_config, ranks)
    sequences = global_batch_size(job_config, degree)
    args, model = model_on_meta(job_config)
    stages = []
    for stage in schedule.until(training.steps):
        shape = schedule.batch_shape(stage.first, sequences, training.seq_len)  # of all ranks
        parameters, flops_per_latent = args.get_nparams_and_flops(model, shape.latents)
        latents = shape.sequences * shape.latents
        stages.append(
            StagePlan(
                stage=stage,
                data_tokens_per_step=shape.sequences * shape.data_tokens,
                latents_per_step=latents,
                flops_per_step=latents * flops_per_latent,
            )
        )
    return Plan(
        ranks=ranks,
        parameters=parameters,
        sequences=sequences,
        data_parallel_ranks=degree,
        local_batch_size=training.local_batch_size,
        stages=tuple(stages),
        tokens_needed=tokens_to_read(job_config, degree, training.steps),
    )


def parameters_of(job_config: JobConfig) -> int:
    """Return the number of parameters of the model.

    Raises:
        ConfigError: if TorchTitan refuses to build the model.
    """
    args, model = model_on_meta(job_config)
    return args.get_nparams_and_flops(model, job_config.training.seq_len)[0]


def mfu_of_paper(job_config: JobConfig, plan: Plan) -> float | None:
    """Return the MFU of the paper's baseline of this flavor, by its B200 hours; None for others.

    The FLOPs of a latent are those of this config: the paper does not give its sequence length.
    """
    run = next((run for run in paper.runs().values() if run.model == job_config.model.flavor), None)
    if run is None:
        return None
    flops = plan.recovery.flops_per_step / plan.recovery.latents_per_step * run.latents
    return flops / (run.b200_hours * 3600 * GPUS["B200"].peak_flops)


def describe_data(job_config: JobConfig, plan: Plan) -> list[str]:
    """Return the tokens needed and the tokens available, a line for each source."""
    if not is_token_shards(job_config.training):
        dataset = job_config.training.dataset
        return [f"{plan.tokens_needed:,} tokens of {dataset}, tokenized while training"]
    try:
        mixture = open_mixture(job_config, None)
    except ShardError as error:
        section = token_shards_section(job_config)
        folders = section.paths or [str(job_config.training.dataset_path)]
        weights = section.weights
        whole = f"{plan.tokens_needed:,} tokens of {', '.join(folders)}"
        return [whole + (f" with weights {weights}" if weights else ""), f"not complete: {error}"]
    lines = []
    for source, share in zip(mixture.sources, mixture.shares, strict=True):
        needed = share * plan.tokens_needed
        lines.append(
            f"{needed:,.0f} tokens of {source.folder}, which has {source.tokens:,}: "
            f"{needed / source.tokens:.2f} epochs"
            + (
                ", NOT ENOUGH: at equal data an ordinary run is better"
                if needed > source.tokens
                else ""
            )
        )
    return lines
