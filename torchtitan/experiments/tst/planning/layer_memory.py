"""The activation memory of a layer: what its forward saves, and what its backward adds."""

import dataclasses
import enum
import math

from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.models.moe.utils import TOKEN_GROUP_ALIGN_SIZE_M

from .model_shape import Layout, ModelShape

_FLOAT32, _INT64 = 4, 8
_NORM = 2 * _FLOAT32  # bytes of an element that a norm saves: two copies in float32


@dataclasses.dataclass(frozen=True)
class Forward:
    """The forward pass of one micro-batch on a rank.

    Attributes:
        layout: layout of the job.
        latents: latents of the rank; the ranks of its tensor-parallel group share them.
        worst: whether routers send as many latents as they can to this rank's experts.
    """

    layout: Layout
    latents: int
    worst: bool = False

    @property
    def of_sequence_parallel(self) -> int:
        """Latents of this rank alone where tensor parallelism shards the sequence."""
        return self.latents // self.layout.tensor

    @property
    def autocasts(self) -> bool:
        """Whether latents stay in float32, and each product casts its inputs."""
        return self.layout.without_fsdp


class Recomputed(enum.Enum):
    """The part of a layer that backward recomputes."""

    NO = enum.auto()
    OPERATORS = enum.auto()  # everything except the outputs of some operators
    ALL = enum.auto()


class LayerMemory:
    """Estimates the activation memory of a layer, in bytes.

    Args:
        shape: shape of the model.
        checkpointing: ``[activation_checkpoint]`` of the job.
        compute: bytes of an element in the dtype of computation.
    """

    def __init__(self, shape: ModelShape, checkpointing: ActivationCheckpoint, compute: int):
        self.shape, self.checkpointing, self.compute = shape, checkpointing, compute

    def recomputed(self, layers: int) -> list[Recomputed]:
        """Return the part of each of ``layers`` layers that backward recomputes."""
        mode, option = self.checkpointing.mode, self.checkpointing.selective_ac_option
        if mode in ("none", "memory_budget"):
            return [Recomputed.NO] * layers
        if mode == "selective" and option == "op":
            return [Recomputed.OPERATORS] * layers
        every = int(option) if mode == "selective" else 1
        return [
            Recomputed.NO if every and (index + 1) % every else Recomputed.ALL
            for index in range(layers)
        ]

    def kept(self, forward: Forward, layers: int) -> list[int]:
        """Return the bytes that each layer keeps from its forward to its backward."""
        input = self.input(forward)
        sizes = {
            Recomputed.NO: self.saved(forward),
            Recomputed.OPERATORS: input + self._outputs_of_operators(forward),
            Recomputed.ALL: input,
        }
        return [sizes[recomputed] for recomputed in self.recomputed(layers)]

    def input(self, forward: Forward) -> int:
        """Return the bytes of a layer's input."""
        size = _FLOAT32 if forward.autocasts else self.compute
        return forward.of_sequence_parallel * self.shape.dim * size

    def norm(self, forward: Forward) -> int:
        """Return the bytes that a norm of the latents saves."""
        return forward.of_sequence_parallel * self.shape.dim * _NORM

    def backward(self, forward: Forward, index: int) -> int:
        """Return the bytes that a layer holds at the peak of its backward.

        Args:
            forward: the forward pass before it.
            index: number of the layer, from 0.
        """
        shape, layout = self.shape, forward.layout
        held = self.saved(forward)
        if self.recomputed(index + 1)[index] is not Recomputed.NO:
            held += self.input(forward)
        gradient = forward.of_sequence_parallel * shape.dim * self.compute
        if shape.experts:
            routed = forward.latents * shape.top_k * shape.dim
            combining = routed * (_FLOAT32 + self.compute)
            computing = (routed + 2 * self.rows(forward) * shape.dim) * self.compute
            return held + max(combining, computing) + 5 * gradient
        hidden = forward.latents * shape.hidden // layout.tensor * self.compute
        return held + 3 * hidden + 2 * gradient

    def saved(self, forward: Forward) -> int:
        """Return the bytes that the layer saves without activation checkpointing."""
        latents, compute = forward.latents, self.compute
        dim = latents * self.shape.dim * compute
        products = 2 * dim  # inputs of attention and of the feed-forward layer
        if forward.autocasts:
            products = 5 * dim  # a copy for each product
        total = 2 * self.norm(forward) + products + self._attention(forward)
        total += 4 * latents * self.shape.hidden // forward.layout.tensor * compute
        if self.shape.experts:
            total += self._experts(forward)
        return total

    def _attention(self, forward: Forward) -> int:
        shape, latents, tensor = self.shape, forward.latents, forward.layout.tensor
        queries = latents * shape.heads * shape.head_dim // tensor
        keys = latents * shape.kv_heads * shape.head_dim // tensor
        total = 2 * (queries + keys) * self.compute  # queries, output, keys, values
        total += latents * shape.heads // tensor * _FLOAT32  # log-sums
        if shape.qk_norm:
            total += (queries + keys) * _NORM
        if forward.layout.context > 1:  # rotations of its positions
            total += latents * shape.head_dim * _FLOAT32
        return total

    def _experts(self, forward: Forward) -> int:
        """Return the bytes that the routed experts and their router save."""
        shape, layout, latents = self.shape, forward.layout, forward.latents
        rows = self.rows(forward)
        tensor = layout.expert_tensor if layout.expert > 1 else layout.tensor
        hidden = shape.expert_hidden // tensor
        router = latents * (shape.experts * _FLOAT32 + shape.top_k * (3 * _INT64 + 3 * _FLOAT32))
        experts = rows * (shape.dim + 4 * hidden) * self.compute
        return router + experts + latents * shape.top_k * shape.dim * _FLOAT32

    def rows(self, forward: Forward) -> int:
        """Return the number of rows that the rank's experts process, padding included."""
        shape, layout = self.shape, forward.layout
        latents = forward.of_sequence_parallel if layout.lends_tensor_ranks else forward.latents
        local = math.ceil(shape.experts / layout.expert)
        rows = latents * shape.top_k
        if forward.worst:
            rows = layout.expert * latents * min(shape.top_k, local)
        return rows + local * TOKEN_GROUP_ALIGN_SIZE_M

    def _outputs_of_operators(self, forward: Forward) -> int:
        """Return the bytes that selective checkpointing of operators saves.

        It saves the outputs of every second product, of attention, and of reduce-scatters.
        """
        shape, latents, tensor = self.shape, forward.latents, forward.layout.tensor
        queries = latents * shape.heads * shape.head_dim // tensor
        keys = latents * shape.kv_heads * shape.head_dim // tensor
        outputs = 2 * queries + keys  # wq, attention, wv
        if shape.hidden:
            outputs += latents * shape.hidden // tensor  # w1
            outputs += latents * shape.dim  # w2, before its sum over the ranks
        if tensor > 1:
            outputs += 2 * forward.of_sequence_parallel * shape.dim
        return outputs * self.compute + latents * shape.heads // tensor * _FLOAT32
