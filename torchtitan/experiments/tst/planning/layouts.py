"""The layouts that a job can have on a number of GPUs, each with its memory and communication.

Every way to write the ranks as a product of degrees goes through the checks of a job. Layouts that
pass are estimated from shapes, without simulating a step (:mod:`.layout_memory`,
:mod:`.layout_traffic`), so that 1,024 ranks take seconds.
"""

import copy
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator

from torchtitan.config import JobConfig

from ..checks.combinations import check_combinations
from ..checks.extensions import register_extensions
from ..checks.layout import check_layout
from ..checks.model import model_args_of
from ..checks.superposition import check_superposition
from ..config.job_config import superposition_section
from ..config.layout import dp_degree, global_batch_size
from ..config.values import check_values
from ..core import Schedule
from ..errors import ConfigError
from .dry_run import Memory
from .layout_memory import Batch, LayoutMemory
from .layout_traffic import LayoutTraffic, Traffic
from .model_shape import Layout, ModelShape, shape_of
from .pipeline_stages import bubble, microbatches_of, pipeline_ranks
from .plan import Gpu
from .trials import RESERVE

KEYS = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "context": "context_parallel_degree",
    "tensor": "tensor_parallel_degree",
    "pipeline": "pipeline_parallel_degree",
    "expert": "expert_parallel_degree",
    "expert_tensor": "expert_tensor_parallel_degree",
}
_OVERLAPS = ("FSDP", "DDP")  # communication that overlaps with the computation of other layers


@dataclasses.dataclass(frozen=True)
class Machine:
    """The GPUs that layouts are listed for.

    Attributes:
        gpu: kind of GPU.
        ranks: number of GPUs.
        node: GPUs of a node.
        mfu: MFU of a step without its communication, in (0, 1].
    """

    gpu: Gpu
    ranks: int
    node: int
    mfu: float

    @property
    def usable(self) -> float:
        """Bytes of a GPU without the reserve for CUDA context, NCCL and fragmentation."""
        return (1 - RESERVE) * self.gpu.memory


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout that TorchTitan accepts, with what a step needs on each GPU.

    Attributes:
        layout: degrees of the parallelisms.
        batch: batch of a data-parallel rank.
        memory: memory at the peak of a step of recovery, with balanced experts.
        worst: the same when as many latents as possible go to one rank's experts; equal to
            ``memory`` where ranks do not share experts.
        traffic: bytes by kind.
        compute: seconds of computation, including a pipeline's idle time.
        hidden: seconds of FSDP's and DDP's communication, which overlaps with computation.
        exposed: seconds of the other kinds of communication, which computation waits for.
    """

    layout: Layout
    batch: Batch
    memory: Memory
    worst: Memory
    traffic: dict[str, Traffic]
    compute: float
    hidden: float
    exposed: float

    @property
    def communication(self) -> float:
        """Seconds of all communication."""
        return self.hidden + self.exposed

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return max(self.compute, self.hidden) + self.exposed

    @property
    def order(self) -> tuple[float, ...]:
        """Sort key, smaller is better: time, communication, number of parallelisms, worst memory.

        Times that agree in two digits count as equal.
        """
        times = (float(f"{seconds:.2g}") for seconds in (self.step, self.communication))
        degrees = dataclasses.astuple(self.layout)
        return *times, sum(degree > 1 for degree in degrees), self.worst.peak


@dataclasses.dataclass(frozen=True)
class Layouts:
    """The layouts of a job.

    Attributes:
        shape: shape of the model.
        sequences: sequences in a step on all ranks.
        fitting: layouts that fit in memory, the fastest first.
        nearest: the layout that needs least memory of those that do not fit; None if all fit.
        too_large: number of layouts that do not fit.
        refused: number of layouts that cannot run, by the reason.
    """

    shape: ModelShape
    sequences: int
    fitting: list[Candidate]
    nearest: Candidate | None
    too_large: int
    refused: Counter[str]

    @property
    def choice(self) -> Candidate | None:
        """The fastest layout whose worst case fits, else the fastest that fits; None without."""
        return self.fitting[0] if self.fitting else None


def layouts_of(job_config: JobConfig, machine: Machine) -> Layouts:
    """Return the layouts of a job on any number of ranks.

    All layouts have the job's keys, except for the degrees and, where it must be smaller,
    ``training.local_batch_size``. The sequences of a step are those of the job's own layout.

    Args:
        job_config: the job's config.
        machine: the GPUs to run on.

    Raises:
        ConfigError: for a job that cannot run in any layout, or an architecture that is not known.
    """
    check_values(job_config)
    register_extensions(job_config)
    schedule = check_superposition(
        superposition_section(job_config), job_config.training, job_config.checkpoint.enable
    )
    shape = shape_of(job_config)
    return _Search(job_config, machine, schedule, shape).run()


def degrees_of(ranks: int, shape: ModelShape) -> Iterator[Layout]:
    """Yield every layout of ``ranks`` ranks whose degrees can divide the model's experts."""
    for pipeline, tensor, context, replicate in itertools.product(_divisors(ranks), repeat=4):
        others = pipeline * tensor * context * replicate
        if ranks % others:
            continue
        layout = Layout(replicate, ranks // others, context, tensor, pipeline)
        yield layout
        shards = layout.shards * tensor
        for expert in _divisors(shape.experts) if shape.experts else ():
            for expert_tensor in {1, tensor} if expert > 1 else ():
                if shards % (expert * expert_tensor) == 0:
                    yield dataclasses.replace(layout, expert=expert, expert_tensor=expert_tensor)


@functools.cache
def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


class _Search:
    """The search for the layouts of a job."""

    def __init__(
        self,
        job_config: JobConfig,
        machine: Machine,
        schedule: Schedule,
        shape: ModelShape,
    ):
        self.job_config, self.machine, self.schedule = job_config, machine, schedule
        self.shape, self.model_args = shape, model_args_of(job_config)
        self.sequences = global_batch_size(job_config, dp_degree(job_config, machine.ranks))
        flops = self.sequences * job_config.training.seq_len * shape.flops
        self.compute = flops / (machine.ranks * machine.gpu.peak_flops * machine.mfu)
        self.limit = machine.usable
        self.memory = LayoutMemory(job_config, shape)
        self.traffic = LayoutTraffic(job_config, shape, machine.node)

    def run(self) -> Layouts:
        fitting: list[Candidate] = []
        too_large: list[Candidate] = []
        refused, refusal = Counter[str](), None
        for layout in degrees_of(self.machine.ranks, self.shape):
            try:
                candidate = self._largest_that_fits(layout)
            except ConfigError as error:
                refused[str(error).partition(" = ")[0]] += 1
                refusal = refusal or error  # the first one, of FSDP alone
                continue
            (fitting if self._fits(candidate) else too_large).append(candidate)
        if refusal and not fitting + too_large:
            raise refusal
        fitting.sort(key=lambda one: (one.worst.peak > self.limit, *one.order))
        nearest = min(too_large, key=lambda one: one.memory.peak, default=None)
        return Layouts(self.shape, self.sequences, fitting, nearest, len(too_large), refused)

    def _fits(self, candidate: Candidate) -> bool:
        return candidate.memory.peak <= self.limit

    def _largest_that_fits(self, layout: Layout) -> Candidate:
        """Return the layout with the job's local batch, or the largest smaller one that fits.

        Raises:
            ConfigError: if the layout cannot run with any local batch.
        """
        _check_model(layout, self.shape)
        of_rank, rest = divmod(self.sequences, layout.data_parallel)
        if rest:
            raise ConfigError(
                "training.global_batch_size",
                self.sequences,
                f"must be a multiple of the {layout.data_parallel} data-parallel ranks",
            )
        local = self.job_config.training.local_batch_size
        smallest, refusal = None, None
        for size in [size for size in reversed(_divisors(of_rank)) if size <= local]:
            try:
                smallest = self._candidate(layout, size, of_rank // size)
            except ConfigError as error:
                refusal = refusal or error  # the error of the largest local batch
                if layout.pipeline == 1:
                    break  # only a pipeline restricts the local batch
                continue
            if self._fits(smallest):
                break
        if smallest is None:
            assert refusal is not None  # 1 divides every number
            raise refusal
        return smallest

    def _candidate(self, layout: Layout, local: int, accumulation: int) -> Candidate:
        """Return a layout with its estimates.

        Raises:
            ConfigError: if the layout cannot run.
        """
        config = self._config(layout, local)
        check_combinations(config, self.model_args)
        check_layout(config, self.schedule, self.machine.ranks)
        batch = Batch(local, accumulation, config.training.seq_len)
        ranks = pipeline_ranks(config, layout.pipeline, self.shape.layers)
        memory = worst = self.memory.of(layout, batch, ranks)
        if layout.expert > 1 and not config.debug.moe_force_load_balance:
            worst = self.memory.of(layout, batch, ranks, worst=True)
        traffic = self.traffic.of(layout, batch, ranks)
        gpu = self.machine.gpu
        seconds = {kind: of.seconds(gpu.nvlink, gpu.network) for kind, of in traffic.items()}
        hidden = sum(seconds[kind] for kind in _OVERLAPS)
        return Candidate(
            layout=layout,
            batch=batch,
            memory=memory,
            worst=worst,
            traffic=traffic,
            compute=self.compute * (1 + bubble(ranks, microbatches_of(config))),
            hidden=hidden,
            exposed=sum(seconds.values()) - hidden,
        )

    def _config(self, layout: Layout, local: int) -> JobConfig:
        config = copy.copy(self.job_config)
        degrees = {key: getattr(layout, name) for name, key in KEYS.items()}
        config.parallelism = dataclasses.replace(config.parallelism, **degrees)
        config.training = dataclasses.replace(
            config.training, local_batch_size=local, global_batch_size=self.sequences
        )
        return config


def _check_model(layout: Layout, shape: ModelShape) -> None:
    """Check what TorchTitan itself checks when it shards the model or runs its first step.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    for what, heads in (("heads", shape.heads), ("key-value heads", shape.kv_heads)):
        if heads % layout.tensor:
            raise ConfigError(
                f"parallelism.{KEYS['tensor']}",
                layout.tensor,
                f"must divide the {heads} {what} of the model",
            )
    several = max(layout.tensor, layout.pipeline, layout.expert) > 1
    if layout.without_fsdp and several:
        raise ConfigError(
            f"parallelism.{KEYS['shard']}",
            1,
            "must be above 1 with tensor, pipeline or expert parallelism: without FSDP, TorchTitan "
            "computes in float32, and it does not combine DDP with them",
        )
    for parameter in shape.parameters["experts"]:
        ranks, dim = parameter.fsdp(layout)
        if dim and (width := parameter.of_rank(layout)[dim]) % ranks:
            raise ConfigError(
                f"parallelism.{KEYS['expert']}",
                layout.expert,
                f"leaves {ranks} ranks to shard each expert: that number must divide the expert's "
                f"width, {width}",
            )
