"""A model of your own under this trainer: short convolutions and attention in turn.

Run it from the root of the repository::

    tst train docs/examples/own_model.toml

The TOML names this module in ``experimental.custom_import``; importing it registers the model.
There is no code for bags here: the trainer makes ``tok_embeddings`` accept them, and all other
modules see latents (B, L, d) as they see single tokens.
"""

from dataclasses import dataclass

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.components.validate import build_validator
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.models.llama3.infra import parallelize as of_llama
from torchtitan.protocols import BaseModelArgs, ModelProtocol
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec


@dataclass
class OwnModelArgs(BaseModelArgs):
    """The shape of the model."""

    dim: int = 64
    n_layers: int = 4
    n_heads: int = 4
    hidden_dim: int = 160
    kernel_size: int = 4
    vocab_size: int = 1024

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        """Refuse what the model does not support, before a GPU is used."""
        layout = job_config.parallelism
        for degree in ("tensor_parallel_degree", "context_parallel_degree"):
            if getattr(layout, degree) > 1:
                raise NotImplementedError(f"parallelism.{degree} must be 1 for this model")

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return the number of parameters, and the FLOPs of a position, forward and backward."""
        parameters = sum(p.numel() for p in model.parameters())
        embedding = self.vocab_size * self.dim  # a lookup has no FLOPs
        attention = self.n_layers // 2 * 2 * self.dim * seq_len  # scores and values
        return parameters, 6 * (parameters - embedding + attention)


class GatedConvolution(nn.Module):
    """Mix each position with those just before it: a causal convolution between two gates."""

    def __init__(self, args: OwnModelArgs):
        super().__init__()
        self.w_in = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.convolution = nn.Conv1d(
            args.dim, args.dim, args.kernel_size, groups=args.dim, bias=False
        )
        self.w_out = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mixed positions (B, L, d) of positions (B, L, d)."""
        before, after, x = self.w_in(x).chunk(3, dim=-1)
        x = (before * x).transpose(1, 2)  # (B, L, d) -> (B, d, L)
        x = self.convolution(F.pad(x, (self.convolution.kernel_size[0] - 1, 0)))
        return self.w_out(after * x.transpose(1, 2))


class Attention(nn.Module):
    """Causal attention. It needs no positions, because the convolutions know the order."""

    def __init__(self, args: OwnModelArgs):
        super().__init__()
        self.n_heads = args.n_heads
        self.w_in = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.w_out = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the attended positions (B, L, d) of positions (B, L, d)."""
        heads = self.w_in(x).unflatten(-1, (3, self.n_heads, -1))  # (B, L, 3, heads, d/heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.w_out(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """A gated MLP."""

    def __init__(self, args: OwnModelArgs):
        super().__init__()
        self.w_in = nn.Linear(args.dim, 2 * args.hidden_dim, bias=False)
        self.w_out = nn.Linear(args.hidden_dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, L, d) of positions (B, L, d)."""
        gate, x = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(F.silu(gate) * x)


class Block(nn.Module):
    """A layer: a convolution or attention, then an MLP, each behind a norm."""

    def __init__(self, layer: int, args: OwnModelArgs):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(args.dim, eps=1e-5)
        self.mixer = Attention(args) if layer % 2 else GatedConvolution(args)
        self.mlp_norm = nn.RMSNorm(args.dim, eps=1e-5)
        self.mlp = FeedForward(args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, L, d) of positions (B, L, d)."""
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class OwnModel(ModelProtocol):
    """The model. The trainer needs the names ``tok_embeddings`` and ``output``.

    The names ``layers`` and ``norm`` are those that TorchTitan's FSDP and pipelines look for. A
    stage of a pipeline has some of the modules. The others are None there.
    """

    def __init__(self, args: OwnModelArgs):
        super().__init__(args)
        self.model_args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({f"{i}": Block(i, args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=1e-5)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Give all parameters their first values; the trainer builds the model without memory."""
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
            elif isinstance(module, nn.Linear | nn.Conv1d):
                std = module.weight[0].numel() ** -0.5
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, L, V) of token ids (B, L) or of bags (B, L, s).

        Only ``tok_embeddings`` reads the token ids.
        """
        x = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for block in self.layers.values():
            x = block(x)
        if self.output is None:
            return x
        return self.output(self.norm(x))


def parallelize_own_model(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply activation checkpointing, torch.compile and FSDP2 or DDP, as TorchTitan's Llama 3."""
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        of_llama.apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=of_llama._op_sac_save_list,
            base_folder=job_config.job.dump_folder,
        )
    if compiled:
        of_llama.apply_compile(model, job_config.compile)
    if parallel_dims.fsdp_enabled:
        replicas = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
        of_llama.apply_fsdp(
            model,
            parallel_dims.get_mesh([*replicas, "fsdp"]),
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            pp_enabled=parallel_dims.pp_enabled,
            cpu_offload=job_config.training.enable_cpu_offload,
            reshard_after_forward_policy=job_config.parallelism.fsdp_reshard_after_forward,
        )
    elif parallel_dims.dp_replicate_enabled:
        mesh = parallel_dims.get_mesh("dp_replicate")
        of_llama.apply_ddp(model, mesh, enable_compile=compiled)
    return model


def train_spec() -> TrainSpec:
    """Return what TorchTitan needs to train the model; all builders are TorchTitan's own."""
    return TrainSpec(
        model_cls=OwnModel,
        model_args={"small": OwnModelArgs(), "wide": OwnModelArgs(dim=128, hidden_dim=320)},
        parallelize_fn=parallelize_own_model,
        pipelining_fn=pipeline_llm,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_text_dataloader,
        build_tokenizer_fn=build_hf_tokenizer,
        build_loss_fn=build_cross_entropy_loss,
        build_validator_fn=build_validator,
    )


def load_model(checkpoint: str, flavor: str = "small") -> OwnModel:
    """Return the model with the weights of a checkpoint: an ordinary next-token model."""
    model = OwnModel(train_spec().model_args[flavor])
    weights = model.state_dict()
    dcp.load(weights, checkpoint_id=checkpoint)
    model.load_state_dict(weights)
    return model.eval()


register_train_spec("own_model", train_spec())
