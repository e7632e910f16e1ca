"""A record of the steps of a training, made by torch's hooks for optimizers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .implementation import AfterStep
from .references import number


class State:
    """Weights and optimizer state at one moment, in the order of the optimizers' parameters."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[torch.Tensor, dict[str, Any]]] = {}

    def add(self, own: Optimizer) -> None:
        """Copy the weights and the state of an optimizer."""
        for weight in (p for group in own.param_groups for p in group["params"]):
            state = own.state.get(weight, {})
            if state or id(weight) not in self._of:  # an optimizer may wrap another
                copies = {key: torch.as_tensor(value).clone() for key, value in state.items()}
                self._of[id(weight)] = weight.detach().clone(), copies

    @property
    def weights(self) -> list[torch.Tensor]:
        """All weights."""
        return [weight for weight, _ in self._of.values()]

    @property
    def states(self) -> list[dict[str, torch.Tensor]]:
        """The optimizer state of each weight, such as the moments of Adam."""
        return [state for _, state in self._of.values()]


@dataclass
class Step:
    """A step of training, as the suite saw it.

    Attributes:
        inputs: its tokens, (B, T).
        labels: its next tokens, (B, T).
        loss: its training loss.
        before: state just before the optimizer stepped.
        after: state just after it.
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
    before, after, rates = State(), State(), list[float]()

    def pre(stepping: Optimizer, *_: object) -> None:
        before.add(stepping)
        rates.extend(float(group["lr"]) for group in stepping.param_groups)

    def after_step(inputs: torch.Tensor, labels: torch.Tensor, loss: float | torch.Tensor) -> None:
        nonlocal before, after, rates
        batch = inputs.clone(), labels.clone()
        steps.append(Step(*batch, number(loss), before, after, rates, look()))
        before, after, rates = State(), State(), []

    hooks = (
        register_optimizer_step_pre_hook(pre),
        register_optimizer_step_post_hook(lambda stepping, *_: after.add(stepping)),
    )
    try:
        train(after_step)
    finally:
        for hook in hooks:
            hook.remove()
    return steps
