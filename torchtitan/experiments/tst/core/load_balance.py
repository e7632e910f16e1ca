"""Load balance of a mixture of experts: counts of each expert's tokens, and the auxiliary loss.

The auxiliary loss of a layer with E experts, over the global batch (Qiu et al. 2025, arXiv
2501.11873, after Fedus et al. 2021, arXiv 2101.03961, equation 4)::

    E * sum_i f_i * P_i

f_i is the share of all choices of the layer's router that went to expert i, P_i the mean of the
router's probability of expert i. It is 1 where all experts get the same, and at most E.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

ScoreFunction = Literal["softmax", "sigmoid"]


class ExpertLoad:
    """Counts what the experts of all layers get in a step, and adds the auxiliary loss's gradient.

    In superposition a token is a latent. The gradient enters where the router's scores leave the
    router, so the loss of the model stays what it is. It takes the counts of all micro-batches of
    the step so far, of all ranks. They are added up once for a micro-batch, in its backward.

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
        """Forget the last step.

        Args:
            tokens: of the global batch, in all micro-batches, that a layer sees.
        """
        self._tokens = tokens
        self._counts = self._probabilities = self._shares = None

    def count(self, layer: int, tokens_per_expert: torch.Tensor) -> None:
        """Count the choices of a micro-batch.

        Args:
            layer: number of the layer in the model.
            tokens_per_expert: how often each expert was chosen, (E,).
        """
        if self._counts is None:
            self._counts = tokens_per_expert.new_zeros(self.shape, dtype=torch.int64)
        self._counts[layer] += tokens_per_expert
        self._shares = None

    def with_auxiliary_loss(
        self, layer: int, scores: torch.Tensor, logits: torch.Tensor, score_func: ScoreFunction
    ) -> torch.Tensor:
        """Return the scores; in backward the logits get the auxiliary loss's gradient, too.

        Args:
            layer: number of the layer in the model.
            scores: of the chosen experts, (tokens, K).
            logits: of the router, (tokens, E).
            score_func: of the router, which makes scores of the logits.
        """
        return _AuxiliaryLoss.apply(scores, logits, self, layer, score_func)

    def gradient(self, layer: int, probabilities: torch.Tensor) -> torch.Tensor:
        """Return the auxiliary loss's gradient for a micro-batch's sums of probabilities, (E,).

        Args:
            layer: number of the layer in the model.
            probabilities: of each expert, summed over the tokens of the micro-batch, float32 (E,).
        """
        assert self._counts is not None, "count() comes before backward"
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
        """Return this rank's counts and sums of probabilities in this step, float64 (layers, E).

        None if none of its layers has counted.
        """
        if self._counts is None:
            return None
        counts = self._counts.double()
        sums = self._probabilities
        return counts, torch.zeros_like(counts) if sums is None else sums.double()


class _AuxiliaryLoss(torch.autograd.Function):
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
        logits: of the router, (tokens, E).
        score_func: of the router.
    """
    logits = logits.float()
    if score_func == "softmax":
        return F.softmax(logits, -1)
    scores = torch.sigmoid(logits)
    return scores / scores.sum(-1, keepdim=True)


def load_balancing_loss(counts: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return the auxiliary loss of each layer, (layers,).

    Args:
        counts: how often each expert was chosen, (layers, E).
        probabilities: of each expert, summed over all tokens, (layers, E).
    """
    shares, means = (values / values.sum(-1, keepdim=True) for values in (counts, probabilities))
    return counts.shape[-1] * (shares * means).sum(-1)
