"""Bytes that a rank communicates in a step under any layout, from the shapes of tensors.

A rank's bytes are the bytes that it receives in ring algorithms: (n - 1) / n of what n ranks gather
or reduce-scatter, and twice that in an all-reduce. The ranks of a node share the ring's bytes that
cross the network. In an all-to-all, each rank receives its own bytes from every other rank.
"""

import dataclasses
from collections import Counter

from torchtitan.config import JobConfig

from .layer_memory import Forward, LayerMemory, Recomputed
from .layout_memory import Batch, Precision
from .model_shape import Layout, ModelShape, Part
from .pipeline_stages import PipelineRank

KINDS = ("FSDP", "DDP", "TP", "CP", "EP", "PP")
# numbers in float32 that ranks with parts of the vocabulary exchange for each latent
_NUMBERS_OF_LOSS = 3


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in a step.

    Attributes:
        local: bytes over NVLink, from the ranks of its node.
        across: bytes over the network, from other nodes.
    """

    local: float = 0
    across: float = 0

    @property
    def total(self) -> float:
        """All bytes."""
        return self.local + self.across

    def __add__(self, other: "Traffic") -> "Traffic":
        """Return the sum of both."""
        return Traffic(self.local + other.local, self.across + other.across)

    def __mul__(self, times: float) -> "Traffic":
        """Return ``times`` times the bytes."""
        return Traffic(self.local * times, self.across * times)

    def seconds(self, nvlink: float, network: float) -> float:
        """Return the seconds at two bandwidths (bytes per second and GPU), both used at once."""
        return max(self.local / nvlink, self.across / network)


@dataclasses.dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other.

    Attributes:
        size: number of ranks.
        stride: distance between two neighbors, in ranks.
        node: GPUs of a node.
    """

    size: int
    stride: int
    node: int

    @property
    def on_node(self) -> int:
        """Ranks of the group on one node."""
        return max(1, min(self.size, self.node // self.stride))

    def ring(self, share: float) -> Traffic:
        """Return what each rank receives when each sends ``share`` bytes to every other rank."""
        received = share * (self.size - 1)
        crossing = 1 / self.on_node if self.size > self.on_node else 0
        return Traffic(received * (1 - crossing), received * crossing)

    def all_reduce(self, size: float) -> Traffic:
        """Return what each rank receives in an all-reduce of ``size`` bytes."""
        return self.ring(2 * size / self.size)

    def all_to_all(self, size: float) -> Traffic:
        """Return what each rank receives when each spreads ``size`` bytes over all ranks."""
        share = size / self.size
        return Traffic(share * (self.on_node - 1), share * (self.size - self.on_node))

    def neighbor(self, size: float) -> Traffic:
        """Return what a rank receives when the rank before it sends ``size`` bytes."""
        if self.size == 1:
            return Traffic()
        crossing = 1 / self.on_node if self.size > self.on_node else 0
        return Traffic(size * (1 - crossing), size * crossing)


class LayoutTraffic:
    """Estimates the communication of a job's ranks.

    Args:
        job_config: the job's config.
        shape: shape of the job's model.
        node: GPUs of a node.
    """

    def __init__(self, job_config: JobConfig, shape: ModelShape, node: int):
        self.shape, self.node, self.precision = shape, node, Precision.of(job_config)
        self.layer = LayerMemory(shape, job_config.activation_checkpoint, self.precision.compute)
        self.reshard = job_config.parallelism.fsdp_reshard_after_forward
        self.rotates = job_config.parallelism.context_parallel_rotate_method == "alltoall"
        self.gathers_logits = job_config.parallelism.disable_loss_parallel

    def of(self, layout: Layout, batch: Batch, ranks: list[PipelineRank]) -> dict[str, Traffic]:
        """Return the bytes of a step by kind, of the pipeline rank that receives most.

        Args:
            layout: layout of the job.
            batch: batch of a rank.
            ranks: the ranks of the pipeline.
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
        """Return FSDP's traffic: gathers for forward and backward, and reduce-scatter of gradients.

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
        """Return the all-reduce of gradients over replicas: of whole gradients, or of shards."""
        group = Group(layout.replicate, layout.shards * layout.tensor, self.node)
        size = self.precision.parameter if layout.without_fsdp else self.precision.reduce
        return group.all_reduce(part.sharded * size)

    def _tensor_in_layer(self, forward: Forward, recomputed: Recomputed) -> Traffic:
        """Return tensor parallelism's gathers and reduce-scatters around attention and MLP."""
        layout, shape = forward.layout, self.shape
        group = Group(layout.tensor, 1, self.node)
        whole = forward.latents * shape.dim * self.precision.compute
        # twice two of each, because each is the other's backward; a recomputed layer gathers again
        times = 8 + {Recomputed.NO: 0, Recomputed.OPERATORS: 2, Recomputed.ALL: 4}[recomputed]
        if not shape.experts or layout.tensor == 1:
            return group.ring(whole / layout.tensor) * times
        # the gradients of the inputs of router and experts are all-reduced, and then cut
        traffic = group.ring(whole / layout.tensor) * (times - 1)
        scores = forward.latents * shape.experts * self.precision.compute
        parts = scores + whole * (1 if layout.lends_tensor_ranks else shape.top_k)
        return traffic + group.all_reduce(parts)

    def _tensor_outside(self, forward: Forward, rank: PipelineRank) -> Traffic:
        """Return tensor parallelism's traffic at the embedding, the LM head and the loss."""
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
        """Return context parallelism's traffic: keys and values of all ranks, and their gradients.

        Ring attention sends the gradients in float32.
        """
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
        """Return expert parallelism's traffic: latents to their experts and back, balanced."""
        layout, shape = forward.layout, self.shape
        group = Group(layout.expert, layout.expert_tensor, self.node)
        latents = forward.of_sequence_parallel if layout.lends_tensor_ranks else forward.latents
        size = latents * shape.top_k * shape.dim * self.precision.compute
        return group.all_to_all(size) * (4 if recomputed is Recomputed.NO else 6)

    def _pipeline(self, forward: Forward, rank: PipelineRank) -> Traffic:
        """Return the pipeline's traffic: latents from stages before, gradients from those after."""
        layout = forward.layout
        group = Group(layout.pipeline, layout.ranks // layout.pipeline, self.node)
        size = forward.of_sequence_parallel * self.shape.dim * self.precision.compute
        return group.neighbor(size) * (2 * rank.stages - rank.embedding - rank.head)
