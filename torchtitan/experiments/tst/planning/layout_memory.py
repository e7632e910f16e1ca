"""The memory of a rank under any layout, from the shapes of tensors, without simulating a step.

Memory may peak at three moments of a step of recovery: at the loss, when every layer's activations
are saved; at the beginning of a layer's backward, when the layer is recomputed and FSDP has
gathered the one before; and at its end, when the layer's gradients wait for their reduction. The
terms are what the eager trainer allocates, as ``tst dry-run`` adds it up.
"""

import dataclasses
import math

from torchtitan.config import TORCH_DTYPE_MAP, JobConfig

from ..config.job_config import lm_head_section
from .dry_run import Memory
from .layer_memory import Forward, LayerMemory
from .model_shape import Layout, ModelShape, Part
from .pipeline_stages import PipelineRank

_STATES = 2  # Adam's, in the dtype of the parameters
_STEP = 4  # bytes of the step counter that Adam has for each parameter
_LOSS = 12  # bytes per logit at the peak of cross-entropy and its backward
_LOSS_OF_CHUNK = 14  # the same with the LM head in chunks: logits and their gradients at once
_LOSS_PARALLEL = 4  # additional bytes of both per logit with loss parallel


@dataclasses.dataclass(frozen=True)
class Batch:
    """The sequences of a step on a rank.

    Attributes:
        local: sequences in a micro-batch (training.local_batch_size).
        accumulation: micro-batches in a step.
        length: latents in a sequence.
    """

    local: int
    accumulation: int
    length: int


@dataclasses.dataclass(frozen=True)
class Precision:
    """Bytes of an element of the parameters, in computation, and of gradients in a reduction."""

    parameter: int
    compute: int
    reduce: int

    @classmethod
    def of(cls, job_config: JobConfig) -> "Precision":
        """Return the precisions of a job."""
        training = job_config.training
        names = training.dtype, training.mixed_precision_param, training.mixed_precision_reduce
        return cls(*(TORCH_DTYPE_MAP[name].itemsize for name in names))


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Number of elements of a rank's parameters: of a layer with experts, and of other parts."""

    layer: Part
    embedding: Part
    head: Part
    layers: int
    tensors: int

    @property
    def sharded(self) -> int:
        """Elements that the rank keeps."""
        return self.layers * self.layer.sharded + self.embedding.sharded + self.head.sharded

    @property
    def gathered(self) -> int:
        """Elements when all parameters are gathered."""
        return self.layers * self.layer.gathered + self.embedding.gathered + self.head.gathered


class LayoutMemory:
    """Estimates the memory of any rank of a job.

    Args:
        job_config: the job's config.
        shape: shape of the job's model.
    """

    def __init__(self, job_config: JobConfig, shape: ModelShape):
        self.shape, self.precision = shape, Precision.of(job_config)
        self.layer = LayerMemory(shape, job_config.activation_checkpoint, self.precision.compute)
        self.chunks = lm_head_section(job_config).chunks
        self.microbatch = job_config.parallelism.pipeline_parallel_microbatch_size
        self.reshard = job_config.parallelism.fsdp_reshard_after_forward
        self.gathers_logits = job_config.parallelism.disable_loss_parallel

    def of(
        self, layout: Layout, batch: Batch, ranks: list[PipelineRank], worst: bool = False
    ) -> Memory:
        """Return the memory in a step of recovery, of the pipeline rank that needs most.

        Args:
            layout: layout of the job.
            batch: batch of a rank.
            ranks: the ranks of the pipeline.
            worst: whether routers send as many latents as they can to this rank's experts;
                otherwise all experts get the same number.
        """
        memories = [self._of_rank(layout, batch, rank, worst) for rank in ranks]
        fullest = max(range(len(ranks)), key=lambda rank: memories[rank].peak)
        return dataclasses.replace(memories[fullest], pipeline_rank=fullest)

    def _of_rank(self, layout: Layout, batch: Batch, rank: PipelineRank, worst: bool) -> Memory:
        sequences = batch.local if layout.pipeline == 1 else self.microbatch
        latents = sequences * batch.length // layout.context
        forward = Forward(layout, latents, worst)
        weights = self._weights(layout, rank)
        if layout.pipeline > 1:
            return self._in_pipeline(forward, batch, rank, weights)
        if layout.without_fsdp:
            return self._without_fsdp(forward, batch, weights)
        return self._under_fsdp(forward, batch, weights)

    def _weights(self, layout: Layout, rank: PipelineRank) -> _Weights:
        parts = {name: self.shape.part(name, layout) for name in self.shape.parameters}
        none = Part(0, 0, 1)
        names = {
            "layer": rank.layers,
            "experts": rank.layers,
            "embedding": int(rank.embedding),
            "head": int(rank.head),
        }
        return _Weights(
            layer=parts["layer"] + parts["experts"],
            embedding=parts["embedding"] if rank.embedding else none,
            head=parts["head"] if rank.head else none,
            layers=rank.layers,
            tensors=sum(len(self.shape.parameters[name]) * times for name, times in names.items()),
        )

    def _head(self, forward: Forward, weights: _Weights) -> int:
        """Return the bytes of the last norm, the LM head and the loss at their peak."""
        precision, latents = self.precision, forward.latents
        vocabulary, of_loss = self.shape.vocabulary, 0
        if forward.layout.tensor > 1 and not self.gathers_logits:
            vocabulary = math.ceil(vocabulary / forward.layout.tensor)
            of_loss = _LOSS_PARALLEL
        hidden = latents * self.shape.dim * precision.compute
        norm = self.layer.norm(forward) + hidden
        if forward.layout.pipeline > 1:  # a pipeline keeps the output of its last stage
            of_loss += precision.compute
        if self.chunks == 1:
            return norm + (of_loss + _LOSS) * latents * vocabulary
        # the gradients of the hidden states and of the weight are computed along with the loss
        logits = (of_loss + _LOSS_OF_CHUNK) * math.ceil(latents / self.chunks) * vocabulary
        copies = 1 if forward.layout.without_fsdp else 2  # FSDP has a buffer of what it gathered
        return norm + hidden + copies * weights.head.gathered * precision.compute + logits

    def _under_fsdp(self, forward: Forward, batch: Batch, weights: _Weights) -> Memory:
        precision, layers = self.precision, weights.layers
        compute, reduce = precision.compute, precision.reduce
        parameters = weights.sharded * precision.parameter
        gradients = weights.sharded * precision.parameter
        kept = self.layer.kept(forward, layers)
        never = self.reshard == "never"
        gathered = (weights.gathered if never else weights.head.gathered) * compute
        accumulated = batch.accumulation > 1
        moments = [
            (
                parameters + gathered,
                gradients if accumulated else 0,
                sum(kept) + self._head(forward, weights),
            )
        ]
        of_layer = weights.layer.gathered
        prefetched = (of_layer + weights.layer.sharded) * compute
        moments.append(  # the gradient of the LM head waits for its reduction
            (
                parameters,
                (gradients if accumulated else 0) + weights.head.gathered * compute,
                sum(kept) + weights.head.gathered * reduce + prefetched,
            )
        )
        for index in {layers - 1, max(0, layers - 2), max(0, layers - 3), 0}:
            before = sum(kept[:index])
            done = weights.head.sharded + (layers - 1 - index) * weights.layer.sharded
            reduced = gradients if accumulated else done * precision.parameter
            held = parameters + (weights.gathered if never else of_layer) * compute
            next_part = weights.layer if index else weights.embedding
            prefetched = 0 if never else (next_part.gathered + next_part.sharded) * compute
            last = weights.head if index == layers - 1 else weights.layer
            begin = before + prefetched + last.gathered * reduce
            moments.append((held, reduced, begin + self.layer.backward(forward, index)))
            end = before + prefetched + of_layer * reduce
            moments.append((parameters, reduced + of_layer * compute, end))
        return self._fullest(weights, moments)

    def _without_fsdp(self, forward: Forward, batch: Batch, weights: _Weights) -> Memory:
        """Return the memory under DDP, or of a single rank.

        DDP has a bucket for each gradient, and autocast keeps the casts of parameters.
        """
        precision, layers, replicas = self.precision, weights.layers, forward.layout.replicate
        parameters = weights.sharded * precision.parameter
        buckets = parameters if replicas > 1 else 0
        casts = (weights.sharded - weights.embedding.sharded) * precision.compute
        kept = self.layer.kept(forward, layers)
        gradients = parameters if batch.accumulation > 1 else 0
        loss = sum(kept) + casts + self._head(forward, weights)
        moments = [(parameters, gradients, buckets + loss)]
        for index in (layers - 1, 0):
            done = weights.head.sharded + (layers - 1 - index) * weights.layer.sharded
            reduced = gradients or done * precision.parameter
            rest = sum(kept[:index]) + casts + self.layer.backward(forward, index)
            moments.append((parameters, reduced, buckets + rest))
        return self._fullest(weights, moments)

    def _in_pipeline(
        self, forward: Forward, batch: Batch, rank: PipelineRank, weights: _Weights
    ) -> Memory:
        """Return the memory of a pipeline rank.

        Parameters stay gathered and gradients unsharded until the last micro-batch.
        """
        precision, layers = self.precision, weights.layers
        parameters = weights.sharded * precision.parameter + weights.gathered * precision.compute
        gradients = weights.gathered * precision.reduce
        if batch.accumulation > 1:
            gradients += weights.sharded * precision.parameter
        kept = self.layer.kept(forward, layers)
        # stages have a buffer for what they receive in each micro-batch
        buffers = (batch.local // self.microbatch) * rank.stages * 2 * self.layer.input(forward)
        head = self._head(forward, weights) if rank.head else 0
        rest = rank.in_flight * sum(kept) + buffers
        transient = self.layer.backward(forward, layers - 1) - kept[-1] if layers else 0
        return self._fullest(weights, [(parameters, gradients, int(rest + max(head, transient)))])

    def _fullest(self, weights: _Weights, moments: list[tuple[int, int, int]]) -> Memory:
        """Return the memory at the moment that needs most.

        Args:
            weights: weights of the rank.
            moments: bytes of parameters, of gradients and of the rest at each moment.
        """
        optimizer = _STATES * weights.sharded * self.precision.parameter + _STEP * weights.tensors
        # the optimizer's step
        whole = weights.sharded * self.precision.parameter
        parameters, gradients, rest = max([*moments, (whole, whole, 0)], key=sum)
        return Memory(parameters + gradients + optimizer + rest, parameters, gradients, optimizer)
