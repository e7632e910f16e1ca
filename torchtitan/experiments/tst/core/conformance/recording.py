"""A record of the steps of a training, made by torch's hooks for optimizers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .implementation import AfterStep, Implementation
from .references import fold, mce, number

Known = tuple[torch.Tensor, dict[str, torch.Tensor]]  # a weight, and its optimizer state


class Wrong(Exception):  # noqa: N818
    """What is wrong, and what to do."""


class State:
    """Copies of weights and optimizer state at one moment.

    Args:
        optimizers: the optimizers, whose parameters are copied in their order.

    Attributes:
        known: the copies, by the id of the parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer] = ()):
        self._weights: list[torch.Tensor] = []  # kept, so that ids are not used again
        self.known: dict[int, Known] = {}
        for optimizer in optimizers:
            self.add(optimizer)

    def add(self, optimizer: Optimizer) -> None:
        """Copy the weights and the state of one more optimizer."""
        for weight in (p for group in optimizer.param_groups for p in group["params"]):
            state = optimizer.state.get(weight, {})
            if state or id(weight) not in self.known:  # an optimizer may wrap another
                numbers = {k: v for k, v in state.items() if isinstance(v, torch.Tensor | float)}
                copies = {key: torch.as_tensor(value).clone() for key, value in numbers.items()}
                self.known[id(weight)] = weight.detach().clone(), copies
                self._weights.append(weight)

    @property
    def weights(self) -> list[torch.Tensor]:
        """All weights."""
        return [weight for weight, _ in self.known.values()]

    def pairs(self, later: "State") -> list[tuple[Known, Known]]:
        """Pair what is known of each weight now and later.

        Weights that only one of the two has are skipped: an optimizer may step less often. If none
        is in both, the model was built anew, and the pairs follow the order.
        """
        ours, theirs = self.known, later.known
        if common := ours.keys() & theirs.keys():
            return [(ours[key], theirs[key]) for key in ours if key in common]
        return list(zip(ours.values(), theirs.values(), strict=False))


@dataclass
class Step:
    """A step of training, as the suite saw it.

    Attributes:
        inputs: its tokens, (B, T).
        labels: its next tokens, (B, T).
        loss: its training loss.
        before: state just before the optimizer stepped.
        after: state after the step.
        rates: learning rates of the parameter groups.
        seen: what the caller wanted to know after the step.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    loss: float
    before: State
    after: State
    rates: list[float]
    seen: Any


def record(train: Callable[[AfterStep], None], look: Callable[[], Any]) -> list[Step]:
    """Run a training, and record its steps by torch's hooks for optimizers.

    Args:
        train: the training; it calls the function that it is given after each step.
        look: called after each step; what it returns is kept.
    """
    steps: list[Step] = []
    before, stepped, rates = State(), list[Optimizer](), list[float]()

    def pre(optimizer: Optimizer, *_: object) -> None:
        before.add(optimizer)
        # A container of optimizers, such as that of TorchTitan 0.3, has no rate of its own.
        rates.extend(float(group["lr"]) for group in optimizer.param_groups if "lr" in group)

    def after_step(inputs: torch.Tensor, labels: torch.Tensor, loss: float | torch.Tensor) -> None:
        nonlocal before, stepped, rates
        batch = inputs.detach().cpu().clone(), labels.detach().cpu().clone()
        steps.append(Step(*batch, number(loss), before, State(stepped), rates, look()))
        before, stepped, rates = State(), [], []

    hooks = (
        register_optimizer_step_pre_hook(pre),
        register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(optimizer)),
    )
    try:
        train(after_step)
    finally:
        for hook in hooks:
            hook.remove()
    return steps


@dataclass
class Reference:
    """What a step of training must be, given its tokens and the weights before it.

    Attributes:
        loss: its loss.
        cosine: cosine of the step's gradient with the gradient of this loss. Clipping and loss
            scaling change the length of a gradient only.
        trained: number of weights that have a gradient.
    """

    loss: float
    cosine: float
    trained: int

    @classmethod
    def of(cls, logits: torch.Tensor, targets: torch.Tensor, optimizer: Optimizer) -> "Reference":
        """Return the reference of logits (B, L, V) and targets (B, L, s), before a step."""
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        loss = mce(logits, targets)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        trained = [p.grad for p in weights if p.grad is not None]
        pairs = [
            (p.grad.flatten(), gradient.flatten())
            for p, gradient in zip(weights, gradients, strict=True)
            if p.grad is not None and gradient is not None
        ]
        if not pairs:  # the optimizer has copies of the weights, for example in float32
            return cls(loss.item(), 1.0, len(trained))
        found, expected = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
        cosine = torch.cosine_similarity(found, expected, 0).item()
        return cls(loss.item(), cosine, len(trained))


def compare(
    own: Implementation, stream: torch.Tensor, sizes: Sequence[int], steps: list[Step]
) -> list[Reference]:
    """Run a training again, and return what each of its steps must be.

    Args:
        own: a new object of the implementation.
        stream: the tokens, (N,).
        sizes: bag size of each step.
        steps: the steps, as they were recorded.
    """
    found: list[Reference] = []
    finished = 0

    def pre(optimizer: Optimizer, *_: object) -> None:
        if len(found) > finished or finished == len(steps):
            return  # the weights have changed: this is not the first optimizer of the step
        inputs, targets = steps[finished].inputs, steps[finished].labels[..., None]
        if sizes[finished] > 1:
            inputs, targets = fold(inputs, targets[..., 0], sizes[finished])
        with torch.enable_grad():
            logits = own.logits(inputs)
        if not logits.requires_grad:
            raise Wrong("logits has no gradients. Do not compute it under torch.no_grad.")
        found.append(Reference.of(logits, targets, optimizer))

    def after_step(*_: object) -> None:
        nonlocal finished
        finished += 1

    hook = register_optimizer_step_pre_hook(pre)
    try:
        own.train(stream, sizes, after_step)
    finally:
        hook.remove()
    return found
