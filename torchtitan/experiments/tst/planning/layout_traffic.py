"""Bytes that a rank communicates in a step under any layout, from the shapes of tensors.

A rank's bytes are those that it receives, as rings move them: (n - 1) / n of what n ranks gather or
reduce-scatter, twice that for an all-reduce. Of a ring's bytes, a node's ranks share what crosses
the network; in an all-to-all each rank gets its own from every other rank.
"""

import dataclasses
from collections import Counter

from torchtitan.config import JobConfig

from .layer_memory import Forward, LayerMemory, Recomputed
from .layout_memory import Batch, Precision
from .model_shape import Layout, ModelShape, Part
from .pipeline_stages import PipelineRank

KINDS = ("FSDP", "DDP", "TP", "CP", "EP", "PP")
_NUMBERS_OF_LOSS = (
    3  # for each latent, in float32, that ranks with parts of the vocabulary exchange
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in a step.

    Attributes:
        local: over NVLink, from the ranks of its node.
        across: over the network, from other nodes.
    """

    local: float = 0
    across: float = 0

    @property
    def total(self) -> float:
        """All of them."""
        return self.local + self.across

    def __add__(self, other: "Traffic") -> "Traffic":
        """Return both together."""
        return Traffic(self.local + other.local, self.across + other.across)

    def __mul__(self, times: float) -> "Traffic":
        """Return so many times the bytes."""
        return Traffic(self.local * times, self.across * times)

    def seconds(self, nvlink: float, network: float) -> float:
        """Return the time at two bandwidths (bytes per second and GPU), which are used at once."""
        return max(self.local / nvlink, self.across / network)


@dataclasses.dataclass(frozen=True)
class Group:
    """Ranks that communicate: so many, so far from each other, on nodes of so many."""

    size: int
    stride: int
    node: int

    @property
    def on_node(self) -> int:
        """Ranks of the group on one node."""
        return max(1, min(self.size, self.node // self.stride))

    def ring(self, share: float) -> Traffic:
        """Return what each rank receives if each gives every other rank ``share`` bytes once."""
        received = share * (self.size - 1)
        crossing = 1 / self.on_node if self.size > self.on_node else 0
        return Traffic(received * (1 - crossing), received * crossing)

    def all_reduce(self, size: float) -> Traffic:
        """Return what each rank receives in an all-reduce of ``size`` bytes."""
        return self.ring(2 * size / self.size)

    def all_to_all(self, size: float) -> Traffic:
        """Return what each rank receives if each spreads ``size`` bytes over all ranks."""
        share = size / self.size
        return Traffic(share * (self.on_node - 1), share * (self.size - self.on_node))

    def neighbor(self, size: float) -> Traffic:
        """Return what a rank receives if the one before it sends ``size`` bytes."""
        if self.size == 1:
            return Traffic()
        crossing = 1 / self.on_node if self.size > self.on_node else 0
        return Traffic(size * (1 - crossing), size * crossing)


class LayoutTraffic:
    """The communication of a job's ranks.

    Args:
        job_config: of the job.
        shape: of its model.
        node: GPUs of a node.
    """

    def __init__(self, job_config: JobConfig, shape: ModelShape, node: int):
        self.shape, self.node, self.precision = shape, node, Precision.of(job_config)
        self.layer = LayerMemory(shape, job_config.activation_checkpoint, self.precision.compute)
        self.reshard = job_config.parallelism.fsdp_reshard_after_forward
        self.rotates = job_config.parallelism.context_parallel_rotate_method == "alltoall"
        self.gathers_logits = job_config.parallelism.disable_loss_parallel

    def of(self, layout: Layout, batch: Batch, ranks: list[PipelineRank]) -> dict[str, Traffic]:
        """Return the bytes of a step by kind, of the rank of the pipeline that receives most.

        Args:
            layout: of the job.
            batch: of a rank.
            ranks: of the pipeline.
        """
        each = [self._of_rank(layout, batch, rank) for rank in ranks]
        return max(each, key=lambda kinds: sum(traffic.total for traffic in kinds.values()))

    def _of_rank(self, layout: Layout, batch: Batch, rank: PipelineRank) -> dict[str, Traffic]:
        forward = Forward(layout, batch.local * batch.length // layout.context)
        kinds = dict.fromkeys(KINDS, Traffic())
        names = {"layer": rank.layers, "experts": rank.layers}
        names |= {"embedding": int(rank.embedding), "head": int(rank.head)}
        for name, times in names.items():
            part = self.shape.part(name, layout)
            kinds["FSDP"] += self._fsdp(layout, name, part) * times
            kinds["DDP"] += self._ddp(layout, part) * times
        for recomputed, times in Counter(self.layer.recomputed(rank.layers)).items():
            kinds["TP"] += self._tensor_in_layer(forward, recomputed) * times
            kinds["CP"] += self._context(forward, recomputed) * times
            kinds["EP"] += self._expert(forward, recomputed) * times
        kinds["TP"] += self._tensor_outside(forward, rank)
        kinds["PP"] = self._pipeline(forward, rank)
        return {kind: traffic * batch.accumulation for kind, traffic in kinds.items()}

    def _fsdp(self, layout: Layout, name: str, part: Part) -> Traffic:
        """Gathers for forward and backward, and the reduce-scatter of gradients.

        A pipeline gathers once for all micro-batches of a local batch.
        """
        stride = layout.tensor
        if name == "experts" and layout.expert > 1:
            stride = layout.expert * layout.expert_tensor
        group = Group(part.ranks, stride, self.node)
        again = self.reshard == "always"
        if self.reshard == "default":
            again = layout.pipeline == 1 and name != "head"
        gathers = 2 if again else 1
        precision = self.precision
        return group.ring(part.sharded * (gathers * precision.compute + precision.reduce))

    def _ddp(self, layout: Layout, part: Part) -> Traffic:
        """All-reduce of gradients over replicas, of shards where there are any."""
        group = Group(layout.replicate, layout.shards * layout.tensor, self.node)
        size = self.precision.parameter if layout.without_fsdp else self.precision.reduce
        return group.all_reduce(part.sharded * size)

    def _tensor_in_layer(self, forward: Forward, recomputed: Recomputed) -> Traffic:
        """Gathers before and reduce-scatters after attention and feed-forward layer."""
        layout, shape = forward.layout, self.shape
        group = Group(layout.tensor, 1, self.node)
        whole = forward.latents * shape.dim * self.precision.compute
        # twice two of each, as each is the other's backward; what is recomputed gathers again
        times = 8 + {Recomputed.NO: 0, Recomputed.OPERATORS: 2, Recomputed.ALL: 4}[recomputed]
        if not shape.experts or layout.tensor == 1:
            return group.ring(whole / layout.tensor) * times
        # the gradients of what goes to router and experts are all-reduced, and then cut
        traffic = group.ring(whole / layout.tensor) * (times - 1)
        scores = forward.latents * shape.experts * self.precision.compute
        parts = scores + whole * (1 if layout.lends_tensor_ranks else shape.top_k)
        return traffic + group.all_reduce(parts)

    def _tensor_outside(self, forward: Forward, rank: PipelineRank) -> Traffic:
        """The embedding, and the LM head with the loss."""
        tensor, latents = forward.layout.tensor, forward.latents
        group = Group(tensor, 1, self.node)
        compute = self.precision.compute
        whole = group.ring(latents * self.shape.dim * compute / tensor)
        traffic = whole * (2 * rank.embedding + 2 * rank.head)
        if not rank.head:
            return traffic
        if self.gathers_logits:
            return traffic + group.ring(latents * self.shape.vocabulary / tensor * compute)
        return traffic + group.all_reduce(latents * _NUMBERS_OF_LOSS * 4)

    def _context(self, forward: Forward, recomputed: Recomputed) -> Traffic:
        """Keys and values of all ranks, and their gradients, in float32 in ring attention."""
        layout, shape = forward.layout, self.shape
        group = Group(layout.context, layout.tensor, self.node)
        keys = 2 * forward.latents * shape.kv_heads * shape.head_dim // layout.tensor
        size = keys * self.precision.compute
        gathered = group.ring(size)
        if shape.attention == "flex":
            return gathered * (3 if recomputed is Recomputed.ALL else 2)
        if self.rotates:
            gathered = group.neighbor(size) * (layout.context - 1)
        gradients = group.neighbor(keys * 4) * layout.context
        return gathered * (3 if recomputed is Recomputed.ALL else 2) + gradients

    def _expert(self, forward: Forward, recomputed: Recomputed) -> Traffic:
        """Latents to their experts and back, with balanced routers."""
        layout, shape = forward.layout, self.shape
        group = Group(layout.expert, layout.expert_tensor, self.node)
        latents = forward.of_sequence_parallel if layout.lends_tensor_ranks else forward.latents
        size = latents * shape.top_k * shape.dim * self.precision.compute
        return group.all_to_all(size) * (4 if recomputed is Recomputed.NO else 6)

    def _pipeline(self, forward: Forward, rank: PipelineRank) -> Traffic:
        """Latents from the stages before, and gradients from those after."""
        layout = forward.layout
        group = Group(layout.pipeline, layout.ranks // layout.pipeline, self.node)
        size = forward.of_sequence_parallel * self.shape.dim * self.precision.compute
        return group.neighbor(size) * (2 * rank.stages - rank.embedding - rank.head)
