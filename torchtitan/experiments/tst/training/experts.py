"""Balance the experts of TorchTitan's models, and measure their shares of the tokens."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.optimizer import (
    build_optimizers,
    build_optimizers_with_moe_load_balancing,
)
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.moe.moe import MoE
from torchtitan.tools.logging import logger

from ..config.job_config import load_balance_section
from ..core import ExpertLoad
from ..expert_metrics import balance_metrics
from ..upstream.autograd import in_backward
from ..upstream.parallelize import Parallelize, averages_gradients

OptimizersBuilder = Callable[..., Any]


class LoadBalancer:
    """Counts the tokens of the experts and balances them by the method of the job.

    Args:
        job_config: config of the job.
        model_args: model args of its flavor.
    """

    def __init__(self, job_config: JobConfig, model_args: Any):
        section = load_balance_section(job_config)
        self.method = section.method
        self.has_auxiliary_loss = self.method == "auxiliary_loss"
        self.coefficient = section.coefficient
        self._layout: ParallelDims | None = None
        self._moes: list[MoE] = []
        self._counting = True
        self.load = ExpertLoad(
            layers=model_args.n_layers,
            experts=model_args.moe_args.num_experts,
            coefficient=self.coefficient if self.has_auxiliary_loss else 0.0,
            all_reduce=self._all_reduce,
        )

    def announce(self, model: str) -> None:
        """Log the method, and warn if the model cannot be exported.

        Args:
            model: name of the model.
        """
        logger.info(f"Experts: {self.load.shape[1]} per layer, load_balance.method = {self.method}")
        if self.method == "bias" and model == "qwen3":
            logger.warning(
                'load_balance.method = "bias": Qwen 3 in transformers has no router bias, so you '
                'cannot export this model. Set it to "auxiliary_loss"'
            )

    def model_args(self, args: Any) -> Any:
        """Return the model args to build the model with."""
        if self.method != "bias":
            return args
        moe_args = dataclasses.replace(args.moe_args, load_balance_coeff=self.coefficient)
        return dataclasses.replace(args, moe_args=moe_args)

    def optimizers_builder(self, upstream: OptimizersBuilder) -> OptimizersBuilder:
        """Return the ``TrainSpec.build_optimizers_fn`` of the method, given the model's own."""
        if self.method == "upstream":
            return upstream
        if self.method == "bias":
            return build_optimizers_with_moe_load_balancing
        return build_optimizers

    def parallelize(
        self,
        upstream: Parallelize,
        model: nn.Module,
        parallel_dims: ParallelDims,
        job_config: JobConfig,
    ) -> nn.Module:
        """Parallelize the model with ``upstream``, and add hooks to the routers.

        Args:
            upstream: the model's own ``TrainSpec.parallelize_fn``.
            model: the model.
            parallel_dims: the layout of the job.
            job_config: config of the job.
        """
        parallel: Any = upstream(model, parallel_dims, job_config)
        self._layout = parallel_dims
        if averages_gradients(parallel):
            self.load.scale = parallel_dims.dp_replicate
        for name, block in parallel.layers.named_children():
            if isinstance(moe := getattr(block, "moe", None), MoE):
                self._moes.append(moe)
                self._watch(moe.router, int(name))
        return parallel

    def _watch(self, router: Any, layer: int) -> None:
        """Add hooks to a router that count its choices and add the auxiliary loss."""
        gate, load = router.gate, self.load

        def keep_logits(module: nn.Module, args: tuple, logits: torch.Tensor) -> torch.Tensor:
            # In float32, so that the gradients of both losses are summed in it.
            module.logits = logits = logits.float()  # type: ignore[assignment]
            return logits

        def count(module: nn.Module, args: tuple, output: tuple) -> tuple | None:
            logits = gate.__dict__.pop("logits", None)
            if not (self._counting and torch.is_grad_enabled()):
                return None  # in validation, or while a pipeline infers shapes
            scores, experts, chosen = output
            if not in_backward():  # activation checkpointing runs the router again in backward
                load.count(layer, chosen)
            if logits is None:
                return None
            scores = load.with_auxiliary_loss(layer, scores, logits, router.score_func)
            return scores, experts, chosen

        if self.has_auxiliary_loss:
            gate.register_forward_hook(keep_logits)
        router.register_forward_hook(count)

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        """Do not count in this context: its forwards and backwards are not part of a step."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True
            self._forget_upstreams_counts()

    def _forget_upstreams_counts(self) -> None:
        for moe in self._moes:
            moe.tokens_per_expert.zero_()

    def begin_step(self, tokens: int) -> None:
        """Reset the counts for a new step.

        Args:
            tokens: tokens of the global batch that the transformer sees; latents in superposition.
        """
        self.load.begin_step(tokens)
        if self.method == "bias":
            self._forget_upstreams_counts()  # they may have counts of a validation

    def _all_reduce(self, tensor: torch.Tensor, *more: str) -> None:
        assert self._layout is not None
        for name in ("loss", *more):
            if mesh := self._layout.get_optional_mesh(name):
                dist.all_reduce(tensor, group=mesh.get_group())

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Return the metrics of the step so far. Call it on all ranks at once.

        Args:
            device: device of the model.
        """
        own = self.load.totals()
        totals = torch.zeros(2, *self.load.shape, dtype=torch.float64, device=device)
        if own is not None:
            totals += torch.stack(own)
        self._all_reduce(totals, "pp")
        return balance_metrics(totals.cpu(), auxiliary_loss=self.has_auxiliary_loss)
