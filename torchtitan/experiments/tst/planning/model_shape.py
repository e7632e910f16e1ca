"""The shape of a model of Llama 3's or Qwen 3's architecture, and what a rank has of it."""

import dataclasses
import math
from typing import Any

from torchtitan.config import JobConfig

from ..checks.model import model_on_meta
from ..errors import ConfigError

KNOWN = ("llama3", "qwen3")

# The dimension that TorchTitan's tensor parallelism shards, of weights by the end of their names.
_TENSOR_DIM = {
    **dict.fromkeys(("tok_embeddings", "output", "wq", "wk", "wv", "w1", "w3"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, as ``[parallelism]`` has them.

    Attributes:
        replicate: data_parallel_replicate_degree.
        shard: data_parallel_shard_degree.
        context: context_parallel_degree.
        tensor: tensor_parallel_degree.
        pipeline: pipeline_parallel_degree.
        expert: expert_parallel_degree.
        expert_tensor: expert_tensor_parallel_degree.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.replicate * self.shard * self.context * self.tensor * self.pipeline

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.replicate * self.shard

    @property
    def shards(self) -> int:
        """Ranks that FSDP shards a parameter over; those of context parallelism are among them."""
        return self.shard * self.context

    @property
    def expert_shards(self) -> int:
        """Ranks that FSDP shards an expert's parameters over under expert parallelism."""
        return self.shards * self.tensor // (self.expert * self.expert_tensor)

    @property
    def lends_tensor_ranks(self) -> bool:
        """Whether ranks of tensor parallelism have different experts, and route part of the tokens
        each.
        """
        return self.expert > 1 and self.expert_tensor < self.tensor

    @property
    def without_fsdp(self) -> bool:
        """Whether each rank has whole parameters: DDP, or a single rank."""
        return self.shards == 1


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the model.

    Attributes:
        shape: of the whole.
        tensor_dim: the dimension that tensor parallelism shards; None for none.
        expert: whether it belongs to the routed experts, whose number is its first dimension.
    """

    shape: tuple[int, ...]
    tensor_dim: int | None
    expert: bool

    def of_rank(self, layout: Layout) -> list[int]:
        """Return the shape that rank 0 has when FSDP has gathered the parameter."""
        shape, tensor = list(self.shape), layout.tensor
        if self.expert and layout.expert > 1:
            tensor = layout.expert_tensor
            shape[0] = math.ceil(shape[0] / layout.expert)
        if self.tensor_dim is not None:
            shape[self.tensor_dim] = math.ceil(shape[self.tensor_dim] / tensor)
        return shape

    def fsdp(self, layout: Layout) -> tuple[int, int]:
        """Return the ranks that FSDP shards the parameter over, and the dimension.

        Upstream shards experts along their width where there are more ranks than experts.
        """
        if not (self.expert and layout.expert > 1):
            return layout.shards, 0
        ranks = layout.expert_shards
        return ranks, int(ranks * layout.expert > self.shape[0])


@dataclasses.dataclass(frozen=True)
class Part:
    """Elements of a group of parameters that FSDP gathers at once.

    Attributes:
        sharded: kept on each rank, padding included.
        gathered: on a rank while they are gathered, padding included.
        ranks: that they are sharded over.
    """

    sharded: int
    gathered: int
    ranks: int

    def __add__(self, other: "Part") -> "Part":
        """Return the elements of both, which may be sharded over other ranks each."""
        return Part(self.sharded + other.sharded, self.gathered + other.gathered, self.ranks)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What memory and communication of a model depend on.

    Attributes:
        dim: width of the latents.
        layers: number of layers, all alike.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: width of a head.
        hidden: width of the dense feed-forward layer, or of the shared experts; 0 without.
        vocabulary: entries.
        attention: "sdpa", "flex" or "varlen".
        qk_norm: whether queries and keys are normalised.
        experts: routed experts of a layer; 0 in a dense model.
        top_k: experts that a latent is routed to.
        expert_hidden: width of a routed expert.
        flops: of a latent, forward and backward, as upstream counts them for MFU.
        parameters: of the parts "embedding", "layer" (one of them, without routed experts),
            "experts" (of one layer) and "head" (the last norm and the LM head).
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    attention: str
    qk_norm: bool
    experts: int
    top_k: int
    expert_hidden: int
    flops: float
    parameters: dict[str, tuple[Parameter, ...]]

    def part(self, name: str, layout: Layout) -> Part:
        """Return the elements of a part of the model on a rank."""
        sharded = gathered = 0
        ranks = layout.shards
        for parameter in self.parameters[name]:
            shape = parameter.of_rank(layout)
            ranks, dim = parameter.fsdp(layout)
            shape[dim] = math.ceil(shape[dim] / ranks)
            sharded += math.prod(shape)
            gathered += math.prod(shape) * ranks
        return Part(sharded, gathered, ranks)


def shape_of(job_config: JobConfig) -> ModelShape:
    """Return the shape of a job's model, which is built once, without memory.

    Raises:
        ConfigError: if TorchTitan refuses to build the model, or its architecture is another.
    """
    if job_config.model.name not in KNOWN:
        raise ConfigError(
            "model.name",
            job_config.model.name,
            f"layouts are listed for {' and '.join(KNOWN)} only; `tst dry-run` tries one layout",
        )
    args, model = model_on_meta(job_config)
    parts: dict[str, list[Parameter]] = {"embedding": [], "layer": [], "experts": [], "head": []}
    for name, tensor in model.named_parameters():
        if name.startswith("layers.") and not name.startswith("layers.0."):
            continue
        expert = ".moe.experts." in name
        owner = name.removesuffix(".weight").rpartition(".")[2]
        dim = _TENSOR_DIM.get(owner)
        if dim is not None and expert:
            dim += 1  # the first is the experts'
        where = "embedding" if name.startswith("tok_embeddings") else "head"
        if name.startswith("layers."):
            where = "experts" if expert else "layer"
        parts[where].append(Parameter(tuple(tensor.shape), dim, expert))
    _, flops = args.get_nparams_and_flops(model, job_config.training.seq_len)
    parameters = {name: tuple(of) for name, of in parts.items()}
    return _of_args(args, model.get_submodule("layers.0"), flops, parameters)


def _of_args(
    args: Any, block: Any, flops: float, parameters: dict[str, tuple[Parameter, ...]]
) -> ModelShape:
    moe = getattr(block, "moe", None)
    dense = getattr(block, "feed_forward", None) if moe is None else moe.shared_experts
    return ModelShape(
        dim=args.dim,
        layers=args.n_layers,
        heads=args.n_heads,
        kv_heads=args.n_kv_heads or args.n_heads,
        head_dim=getattr(args, "head_dim", args.dim // args.n_heads),
        hidden=0 if dense is None else dense.w1.out_features,
        vocabulary=args.vocab_size,
        attention=getattr(args, "attn_type", "sdpa"),
        qk_norm=getattr(args, "qk_norm", False),
        experts=0 if moe is None else args.moe_args.num_experts,
        top_k=0 if moe is None else args.moe_args.top_k,
        expert_hidden=0 if moe is None else args.moe_inter_dim,
        flops=flops,
        parameters=parameters,
    )
