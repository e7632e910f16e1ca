"""The shape of a Llama 3 or Qwen 3 model, and the part of it that a rank has."""

import dataclasses
import math
from typing import Any

from torchtitan.config import JobConfig

from ..checks.model import model_on_meta
from ..errors import ConfigError

KNOWN = ("llama3", "qwen3")

# The dimension of a weight that TorchTitan's tensor parallelism shards, by the end of its name.
_TENSOR_DIM = {
    **dict.fromkeys(("tok_embeddings", "output", "wq", "wk", "wv", "w1", "w3"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, as in ``[parallelism]``.

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
        """Number of ranks."""
        return self.replicate * self.shard * self.context * self.tensor * self.pipeline

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.replicate * self.shard

    @property
    def shards(self) -> int:
        """Ranks that FSDP shards a parameter over, including those of context parallelism."""
        return self.shard * self.context

    @property
    def expert_shards(self) -> int:
        """Ranks that FSDP shards an expert's parameters over under expert parallelism."""
        return self.shards * self.tensor // (self.expert * self.expert_tensor)

    @property
    def lends_tensor_ranks(self) -> bool:
        """Whether tensor-parallel ranks have different experts, and each routes some tokens."""
        return self.expert > 1 and self.expert_tensor < self.tensor

    @property
    def without_fsdp(self) -> bool:
        """Whether parameters are not sharded by FSDP: DDP, or a single rank."""
        return self.shards == 1


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the model.

    Attributes:
        shape: shape of the whole parameter.
        tensor_dim: the dimension that tensor parallelism shards; None for none.
        expert: whether it belongs to the routed experts; their number is its first dimension.
    """

    shape: tuple[int, ...]
    tensor_dim: int | None
    expert: bool

    def of_rank(self, layout: Layout) -> list[int]:
        """Return the shape on rank 0 when FSDP has gathered the parameter."""
        shape, tensor = list(self.shape), layout.tensor
        if self.expert and layout.expert > 1:
            tensor = layout.expert_tensor
            shape[0] = math.ceil(shape[0] / layout.expert)
        if self.tensor_dim is not None:
            shape[self.tensor_dim] = math.ceil(shape[self.tensor_dim] / tensor)
        return shape

    def fsdp(self, layout: Layout) -> tuple[int, int]:
        """Return the number of ranks that FSDP shards the parameter over, and the dimension.

        Upstream shards experts along their width where there are more ranks than experts.
        """
        if not (self.expert and layout.expert > 1):
            return layout.shards, 0
        ranks = layout.expert_shards
        return ranks, int(ranks * layout.expert > self.shape[0])


@dataclasses.dataclass(frozen=True)
class Part:
    """Number of elements of a group of parameters that FSDP gathers at once.

    Attributes:
        sharded: elements that each rank keeps, padding included.
        gathered: elements on a rank while they are gathered, padding included.
        ranks: number of ranks that they are sharded over.
    """

    sharded: int
    gathered: int
    ranks: int

    def __add__(self, other: "Part") -> "Part":
        """Return the elements of both; they may be sharded over different numbers of ranks."""
        return Part(self.sharded + other.sharded, self.gathered + other.gathered, self.ranks)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The properties of a model that its memory and communication depend on.

    Attributes:
        dim: width of the latents.
        layers: number of layers; all are alike.
        heads: number of query heads.
        kv_heads: number of key-value heads.
        head_dim: width of a head.
        hidden: width of the dense feed-forward layer, or of the shared experts; 0 without.
        vocabulary: number of entries of the vocabulary.
        attention: "sdpa", "flex" or "varlen".
        qk_norm: whether queries and keys are normalised.
        experts: number of routed experts of a layer; 0 in a dense model.
        top_k: number of experts that a latent is routed to.
        expert_hidden: width of a routed expert.
        flops: FLOPs of a latent, forward and backward, as upstream counts them for MFU.
        parameters: the parameters of each part: "embedding", "layer" (one layer, without routed
            experts), "experts" (of one layer) and "head" (the last norm and the LM head).
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
        """Return the number of elements of a part of the model on a rank."""
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
    """Return the shape of a job's model. The model is built once, on the meta device.

    Raises:
        ConfigError: if TorchTitan refuses to build the model, or its architecture is not known.
    """
    if job_config.model.name not in KNOWN:
        raise ConfigError(
            "model.name",
            job_config.model.name,
            f"must be {' or '.join(KNOWN)}: layouts are listed for these only. For another model, "
            "`tst dry-run` tries one layout",
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
            dim += 1  # the first dimension is the number of experts
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
