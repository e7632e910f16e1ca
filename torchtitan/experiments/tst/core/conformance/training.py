"""Checks of training: the engine's own steps, the data, the boundary, validation."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .references import equal, fold, mce
from .suite import Suite, Wrong

_SAME = (
    "At bag size 1, use the engine's own embedding, loss and data, and describe both with the same "
    "precision, compilation and seed."
)


def _bag_size_1_is_ordinary(suite: Suite) -> None:
    pairs = zip(suite.bag_size_1, suite.ordinary, strict=True)
    for number, (ours, engines) in enumerate(pairs, 1):
        if not torch.equal(ours.inputs, engines.inputs):
            raise Wrong(f"Step {number} reads other tokens than the engine's own step. {_SAME}")
        if ours.loss != engines.loss:
            raise Wrong(
                f"Step {number}: the loss is {ours.loss}, the engine's is {engines.loss}. {_SAME}"
            )
        counts = len(ours.after.weights), len(engines.after.weights)
        if counts[0] != counts[1]:
            raise Wrong(
                f"The optimizer has {counts[0]} weights, the engine's has {counts[1]}. Is a tied "
                "LM head no longer tied, or are weights missing in an optimizer?"
            )
        if _changes(ours.after.weights, engines.after.weights):
            raise Wrong(f"Step {number}: the weights are not the engine's. {_SAME}")


def _changes(weights: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    same = len(weights) == len(others)
    return not (same and all(map(torch.equal, weights, others)))


def _training_is_made_of_these_parts(suite: Suite) -> None:
    first = suite.phases[0]
    bags, targets = fold(first.inputs, first.labels, suite.s)
    expected = mce(suite.make().logits(bags), targets).item()
    if not equal(first.loss, expected, 1e-4):
        raise Wrong(
            f"The first step of training has a loss of {first.loss:.5f}; its tokens have "
            f"{expected:.5f}. Does training fold, embed and normalize as the methods do?"
        )


def _gradient_is_that_of_the_loss(suite: Suite) -> None:
    """Compare directions, because clipping and loss scaling change the length only."""
    first, own = suite.phases[0], suite.make()
    bags, targets = fold(first.inputs, first.labels, suite.s)
    cosines: list[float] = []

    def compare(stepping: Optimizer, *_: object) -> None:
        if cosines:
            return
        weights = [p for group in stepping.param_groups for p in group["params"]]
        with torch.enable_grad():
            loss = mce(own.logits(bags), targets)
        if not loss.requires_grad:
            raise Wrong("logits has no gradients. Do not compute it under torch.no_grad.")
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        pairs = [
            (p.grad.flatten(), gradient.flatten())
            for p, gradient in zip(weights, gradients, strict=True)
            if p.grad is not None and gradient is not None
        ]
        if not pairs:  # the optimizer has copies of the weights, for example in float32
            cosines.append(1.0)
            return
        found, expected = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
        cosines.append(torch.cosine_similarity(found, expected, 0).item())

    hook = register_optimizer_step_pre_hook(compare)
    try:
        own.train(suite.stream, suite.sizes, lambda *step: None)
    finally:
        hook.remove()
    if not cosines[0] > 0.999:
        raise Wrong(
            f"The gradient of the first step has a cosine of {cosines[0]:.3f} with that of its "
            "loss. Does each micro-batch add its part, and nothing else?"
        )


def _every_token_is_read_once(suite: Suite) -> None:
    end, gap = None, None  # gap: 1 if the last label of a sequence is not an input of the next
    for number, step in enumerate(suite.phases, 1):
        for row, nexts in zip(step.inputs, step.labels, strict=True):
            places = (suite.stream.unfold(0, len(row), 1) == row.cpu()).all(1).nonzero()
            if not len(places):
                raise Wrong(f"Step {number} reads a sequence that the data does not have.")
            begin = int(places[0])
            if not torch.equal(suite.stream[begin + 1 : begin + 1 + len(nexts)], nexts.cpu()):
                raise Wrong(f"The labels of step {number} are not the next tokens of its inputs.")
            if end is not None:
                gap = begin - end if gap is None else gap
                if begin - end != gap or gap not in (0, 1):
                    raise Wrong(
                        f"A sequence of step {number} begins at token {begin}, but tokens up to "
                        f"{end} were read. The position counts tokens, in both phases. If your "
                        "loop samples windows at random, describe it with windows in order."
                    )
            end = begin + len(row)


def _steps_cost_the_same(suite: Suite) -> None:
    for number, (size, step) in enumerate(zip(suite.sizes, suite.phases, strict=True), 1):
        if step.inputs.numel() != math.prod(suite.size) * size:
            raise Wrong(
                f"Step {number} has bags of {size} and reads {step.inputs.numel()} tokens; it must "
                f"read {math.prod(suite.size) * size}, so that each step has the same number of "
                "latents (Section 3.2). Count steps from 1, and all micro-batches of a step."
            )


def _state_passes_the_boundary(suite: Suite) -> None:
    steps, boundary = suite.phases, suite.sizes.count(suite.s)
    before, after = steps[boundary - 1].after, steps[boundary].before
    if _changes(before.weights, after.weights):
        raise Wrong(
            "The weights change between superposition and recovery. Keep all of them, also those "
            "of the embedding and of the LM head (Table 2)."
        )
    for old, new in zip(before.states, after.states, strict=True):
        lost = [key for key in old if key not in new or not torch.equal(new[key], old[key])]
        if lost:
            raise Wrong(
                f"The optimizer's state is lost at the boundary: {', '.join(lost)}. Keep the "
                "optimizer of superposition, with its moments and its count of steps."
            )


def _one_schedule(suite: Suite) -> None:
    runs = suite.phases, suite.ordinary
    for number, (ours, engines) in enumerate(zip(*runs, strict=True), 1):
        if ours.rates != engines.rates:
            raise Wrong(
                f"Step {number} has learning rates {ours.rates}, an ordinary run {engines.rates}. "
                "Keep one schedule over all steps: no new warm-up at the boundary."
            )


def _validation_is_ordinary(suite: Suite) -> None:
    for number, (size, step) in enumerate(zip(suite.sizes, suite.phases, strict=True), 1):
        validation, expected = step.seen
        if not equal(validation, expected, 1e-4):
            raise Wrong(
                f"After step {number} (bags of {size}), validation gives {validation:.5f}, but the "
                f"next-token loss is {expected:.5f}. Validate on single tokens in both phases."
            )


CHECKS: dict[str, Callable[[Suite], None]] = {
    "Bag size 1 is the engine's own run, bit for bit": _bag_size_1_is_ordinary,
    "Training has the loss of these parts": _training_is_made_of_these_parts,
    "The gradient of a step is that of its loss": _gradient_is_that_of_the_loss,
    "Training reads every token once, in order": _every_token_is_read_once,
    "A superposition step has the latents of an ordinary step": _steps_cost_the_same,
    "Weights and optimizer state pass the boundary": _state_passes_the_boundary,
    "One learning-rate schedule covers both phases": _one_schedule,
    "Validation is next-token loss in both phases": _validation_is_ordinary,
}
