"""Checks of training: the engine's own steps, the data, the boundary, validation."""

import math
from collections.abc import Callable, Sequence

import torch

from .recording import Reference, Step
from .references import equal
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


def _training_has_the_loss_of_its_tokens(suite: Suite) -> None:
    for number, (step, reference) in enumerate(_with_references(suite), 1):
        if not equal(step.loss, reference.loss, 1e-4):
            phase = "superposition" if suite.sizes[number - 1] > 1 else "recovery"
            raise Wrong(
                f"Step {number} ({phase}) reports a loss of {step.loss:.5f}; that of its tokens is "
                f"{reference.loss:.5f}. Does training fold, embed and normalize as the methods do?"
            )


def _with_references(suite: Suite) -> list[tuple[Step, Reference]]:
    if len(suite.references) != len(suite.phases):
        raise Wrong("A second training makes another number of steps than the first one.")
    return list(zip(suite.phases, suite.references, strict=True))


def _gradient_is_that_of_the_loss(suite: Suite) -> None:
    first = suite.references[0].trained
    for number, (_, reference) in enumerate(_with_references(suite), 1):
        if not reference.cosine > 0.999:
            raise Wrong(
                f"The gradient of step {number} has a cosine of {reference.cosine:.3f} with that "
                "of its loss. Does each micro-batch add its part, and nothing else?"
            )
        if reference.trained != first:
            raise Wrong(
                f"Step {number} gives gradients to {reference.trained} weights of the optimizer, "
                f"step 1 to {first}. Does the model use the weights that the optimizer has?"
            )


def _every_token_is_read_once(suite: Suite) -> None:
    """Sequences follow each other in the data, and may share the token that is a label of one.

    That is their gap, 0 or 1, and it may be another one between steps than within them.
    """
    end, gaps = 0, dict[bool, int]()
    for number, step in enumerate(suite.phases, 1):
        for index, (row, nexts) in enumerate(zip(step.inputs, step.labels, strict=True)):
            places = (suite.stream.unfold(0, len(row), 1) == row).all(1).nonzero()
            if not len(places):
                raise Wrong(f"Step {number} reads a sequence that the data does not have.")
            begin = int(places[0])
            if not torch.equal(suite.stream[begin + 1 : begin + 1 + len(nexts)], nexts):
                raise Wrong(f"The labels of step {number} are not the next tokens of its inputs.")
            gap = begin - end
            known = gap if end == 0 else gaps.setdefault(index == 0, gap)
            if gap != known or gap not in (0, 1):
                raise Wrong(
                    f"A sequence of step {number} begins at token {begin}, but tokens up to {end} "
                    "were read. The position counts tokens, in both phases. If your loop samples "
                    "windows at random, describe it with windows in order."
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
    boundary = suite.sizes.count(suite.s)
    pairs = suite.phases[boundary - 1].after.pairs(suite.phases[boundary].before)
    if not all(torch.equal(before, after) for (before, _), (after, _) in pairs):
        raise Wrong(
            "The weights change between superposition and recovery. Keep all of them, also those "
            "of the embedding and of the LM head (Table 2)."
        )
    for (_, old), (_, new) in pairs:
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
                f"next-token loss is {expected:.5f}. Validate on single tokens in both phases, and "
                "compute the loss in float32."
            )


CHECKS: dict[str, Callable[[Suite], None]] = {
    "Bag size 1 is the engine's own run, bit for bit": _bag_size_1_is_ordinary,
    "The loss of a step is that of its tokens": _training_has_the_loss_of_its_tokens,
    "The gradient of a step is that of its loss": _gradient_is_that_of_the_loss,
    "Training reads every token once, in order": _every_token_is_read_once,
    "A superposition step has the latents of an ordinary step": _steps_cost_the_same,
    "Weights and optimizer state pass the boundary": _state_passes_the_boundary,
    "One learning-rate schedule covers both phases": _one_schedule,
    "Validation is next-token loss in both phases": _validation_is_ordinary,
}
