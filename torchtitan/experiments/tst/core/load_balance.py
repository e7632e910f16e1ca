"""Load balance of a mixture of experts: token counts of each expert, and the auxiliary loss.

The auxiliary loss of a layer with E experts, over the global batch (Qiu et al. 2025, arXiv
2501.11873, after Fedus et al. 2021, arXiv 2101.03961, equation 4)::

    E * sum_i f_i * P_i

f_i is the share of the router's choices that went to expert i. P_i is the mean of the router's
probability of expert i. The loss is 1 if all experts get the same share, and at most E.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

ScoreFunction = Literal["softmax", "sigmoid"]


class ExpertLoad:
    """Counts the tokens of each expert in a step, and adds the gradient of the auxiliary loss.

    In superposition a token is a latent. The gradient is added at the output of the router, so the
    loss of the model does not change. It uses the counts of all ranks and of all micro-batches of
    the step so far. These are summed over the ranks once per micro-batch, in its backward.

    Args:
        layers: number of layers of the whole model, with or without experts.
        experts: number of experts E of a layer.
        coefficient: weight of each layer's auxiliary loss; 0 for none.
        all_reduce: replaces a tensor by its sum over the ranks that have other tokens of the batch.

    Attributes:
        scale: factor of the gradient, for data parallelism that divides gradients.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        coefficient: float = 0.0,
        all_reduce: Callable[[torch.Tensor], object] = lambda tensor: None,
    ):
        self.coefficient, self.all_reduce = coefficient, all_reduce
        self.shape = (layers, experts)
        self.scale = 1.0
        self._tokens = 0
        self._counts: torch.Tensor | None = None
        self._probabilities: torch.Tensor | None = None
        self._shares: torch.Tensor | None = None

    def begin_step(self, tokens: int) -> None:
        """Reset the counts for a new step.

        Args:
            tokens: number of tokens of the global batch that a layer sees, in all micro-batches.
        """
        self._tokens = tokens
        self._counts = self._probabilities = self._shares = None

    def count(self, layer: int, tokens_per_expert: torch.Tensor) -> None:
        """Add the router's choices for a micro-batch to the counts.

        Args:
            layer: number of the layer in the model.
            tokens_per_expert: how often the router chose each expert, (E,).
        """
        if self._counts is None:
            self._counts = tokens_per_expert.new_zeros(self.shape, dtype=torch.int64)
        self._counts[layer] += tokens_per_expert
        self._shares = None

    def with_auxiliary_loss(
        self, layer: int, scores: torch.Tensor, logits: torch.Tensor, score_func: ScoreFunction
    ) -> torch.Tensor:
        """Return the scores; their backward also adds the auxiliary loss's gradient to the logits.

        Args:
            layer: number of the layer in the model.
            scores: the router's scores of the chosen experts, (tokens, K).
            logits: the router's logits, (tokens, E).
            score_func: the router's function from logits to scores.
        """
        return _AuxiliaryLoss.apply(scores, logits, self, layer, score_func)

    def gradient(self, layer: int, probabilities: torch.Tensor) -> torch.Tensor:
        """Return the auxiliary loss's gradient for a micro-batch's sums of probabilities, (E,).

        Args:
            layer: number of the layer in the model.
            probabilities: the router's probability of each expert, summed over the tokens of the
                micro-batch, float32 (E,).
        """
        assert self._counts is not None, "call count() before backward"
        if self._shares is None:
            counts = self._counts.clone()
            self.all_reduce(counts)
            self._shares = counts / counts.sum(1, keepdim=True)
        if self._probabilities is None:
            self._probabilities = probabilities.new_zeros(self.shape)
        self._probabilities[layer] += probabilities
        weight = self.coefficient * self.scale * self.shape[1] / self._tokens
        return weight * self._shares[layer].to(probabilities)

    def totals(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return this rank's counts and sums of probabilities in this step.

        Returns:
            Two float64 tensors (layers, E); None if none of this rank's layers has counted.
        """
        if self._counts is None:
            return None
        counts = self._counts.double()
        sums = self._probabilities
        return counts, torch.zeros_like(counts) if sums is None else sums.double()


class _AuxiliaryLoss(torch.autograd.Function):
    """The identity of the scores, with a backward that adds the auxiliary loss's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        logits: torch.Tensor,
        load: ExpertLoad,
        layer: int,
        score_func: ScoreFunction,
    ) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.load, ctx.layer, ctx.score_func = load, layer, score_func
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        (logits,) = ctx.saved_tensors
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            sums = router_probabilities(logits, ctx.score_func).sum(0)
        of_sums = ctx.load.gradient(ctx.layer, sums.detach())
        (of_logits,) = torch.autograd.grad(sums, logits, of_sums)
        return grads[0], of_logits, None, None, None


def router_probabilities(logits: torch.Tensor, score_func: ScoreFunction) -> torch.Tensor:
    """Return the router's probabilities of all experts, float32 (tokens, E).

    Scores of 'sigmoid' are divided by their sum (DeepSeek-V3, arXiv 2412.19437, equation 19).

    Args:
        logits: the router's logits, (tokens, E).
        score_func: the router's function from logits to scores.
    """
    logits = logits.float()
    if score_func == "softmax":
        return F.softmax(logits, -1)
    scores = torch.sigmoid(logits)
    return scores / scores.sum(-1, keepdim=True)


def load_balancing_loss(counts: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return the auxiliary loss of each layer, (layers,).

    Args:
        counts: how often the router chose each expert, (layers, E).
        probabilities: the router's probability of each expert, summed over all tokens, (layers, E).
    """
    shares, means = (values / values.sum(-1, keepdim=True) for values in (counts, probabilities))
    return counts.shape[-1] * (shares * means).sum(-1)
