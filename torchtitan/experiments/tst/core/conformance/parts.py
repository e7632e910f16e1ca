"""Checks of the parts of an implementation: folding, embedding, model and loss."""

import math
from collections.abc import Callable

import torch

from .references import IGNORE_INDEX, WEIGHTS, cross_entropy, equal, fold, mce
from .suite import Suite, Wrong


def _inputs_are_bags(suite: Suite) -> None:
    _, (expected, _), (bags, _) = suite.folded()
    if bags.shape != expected.shape:
        raise Wrong(
            f"fold returns bags of shape {(*bags.shape,)} that must be {(*expected.shape,)}. Keep "
            "every token."
        )
    if not torch.equal(bags, expected):
        raise Wrong("Bag j of a sequence must have its tokens j*s to j*s + s-1, in this order.")


def _targets_are_next_bags(suite: Suite) -> None:
    _, (_, expected), (_, targets) = suite.folded()
    if targets.shape != expected.shape:
        raise Wrong(
            f"fold returns targets of shape {(*targets.shape,)} that must be {(*expected.shape,)}. "
            "Do not cut labels: each bag predicts all tokens of the next bag."
        )
    known, kept = expected != IGNORE_INDEX, targets != IGNORE_INDEX
    if shifts := sorted({*(targets - expected)[known & kept].tolist()} - {0}):
        raise Wrong(
            f"The targets are shifted; the offset in tokens is {', '.join(map(str, shifts))}. The "
            "first target of a bag is the token after it: shift next-token labels to the left by "
            "s - 1."
        )
    if (known & ~kept).any():
        raise Wrong("Targets are ignored although the batch has them. Keep all labels.")


def _unknown_targets_are_ignored(suite: Suite) -> None:
    rows, (_, expected), (_, targets) = suite.folded()
    if targets.shape != expected.shape:
        raise Wrong("fold returns targets of a wrong shape.")
    unknown = targets[0][expected[0] == IGNORE_INDEX]
    if torch.isin(unknown, rows[1:]).any():
        raise Wrong(
            "The last bag of a sequence has tokens of another sequence as targets. Fold each "
            f"sequence for itself; targets after its end must be {IGNORE_INDEX}."
        )
    if (unknown != IGNORE_INDEX).any():
        raise Wrong(
            f"The last {len(unknown)} targets of a sequence are not in the batch. They must be "
            f"{IGNORE_INDEX}, so that they do not count. They are {unknown.tolist()}."
        )


def _bag_is_mean(suite: Suite) -> None:
    bags = suite.random(*suite.size, suite.s)
    found = suite.own.embed(bags)
    tokens = suite.own.embed(bags.flatten(1)).float().unflatten(1, (-1, suite.s))
    mean = tokens.mean(2)
    if found.shape != mean.shape:
        raise Wrong(f"embed returns {(*found.shape,)} for bags; it must be {(*mean.shape,)}.")
    if torch.allclose(found.float(), tokens.sum(2), rtol=1e-2):
        raise Wrong("The embedding of a bag is the sum of its tokens'. Divide it by s.")
    # Roundings to the dtype of the embedding, here and in the tokens', and a sum's order in float32
    sizes = mean.abs() + tokens.abs().mean(2)
    rounding = torch.finfo(found.dtype).eps * sizes + 1e-6 * tokens.abs().max()
    if ((found.float() - mean).abs() > rounding).any():
        off = (found.float() - mean).abs().max().item()
        raise Wrong(
            f"The embedding of a bag differs from the mean of its tokens' by up to {off:.1e}. Sum "
            f"in float32, and round to {found.dtype} once (Section 3.1)."
        )


def _later_bags_are_unseen(suite: Suite) -> None:
    shape = (*suite.size, suite.own.vocab_size)
    for inputs in (suite.random(*suite.size, suite.s), suite.random(*suite.size)):
        logits = suite.own.logits(inputs)
        if logits.shape != shape:
            raise Wrong(
                f"logits returns {(*logits.shape,)} for inputs {(*inputs.shape,)}; it must be "
                f"{shape}, with the logits of all positions."
            )
        if not torch.allclose(logits, suite.own.logits(inputs), rtol=1e-3, atol=1e-5):
            raise Wrong("Two equal calls give different logits. Switch dropout off in logits.")
        for cut in (suite.size[1] // 2, suite.size[1] // 2 - 1):  # one of them is odd
            changed = inputs.clone()
            changed[:, cut:] = (changed[:, cut:] + 1) % suite.own.vocab_size
            others = suite.own.logits(changed)
            if not torch.allclose(logits[:, :cut], others[:, :cut], rtol=1e-3, atol=1e-5):
                raise Wrong("Logits depend on later inputs. Attention must be causal over latents.")


def _equal_targets_are_one(suite: Suite) -> None:
    logits, target = suite.random_logits(), suite.random(*suite.size)
    expected = cross_entropy(logits, target).item()
    for weighting in suite.own.weightings:
        targets = target[..., None].repeat(1, 1, suite.s)
        loss = suite.own.loss(logits.clone(), targets, weighting).item()
        if not equal(loss, expected):
            raise Wrong(
                f"With weighting {weighting}, the loss is {loss:.4f}, but that of the same single "
                f"targets is {expected:.4f}. Divide the weighted sum by the sum of the weights."
            )


def _loss_is_mean_over_bag(suite: Suite) -> None:
    logits, targets = suite.random_logits(), suite.random(*suite.size, suite.s)
    for weighting in suite.own.weightings:
        loss = suite.own.loss(logits.clone(), targets, weighting).item()
        if not equal(loss, expected := mce(logits, targets, weighting).item()):
            raise Wrong(
                f"With weighting {weighting}, the loss is {loss:.5f}; it must be {expected:.5f}, "
                "the weighted mean of the bag's cross-entropies (Section 3.3)."
            )


def _ignored_targets_do_not_count(suite: Suite) -> None:
    logits, targets = suite.random_logits(), suite.random(*suite.size, suite.s)
    targets = fold(targets.flatten(1), targets.flatten(1), suite.s)[1]
    for weighting in suite.own.weightings:
        expected = mce(logits, targets, weighting).item()
        loss = suite.own.loss(logits.clone(), targets, weighting).item()
        if equal(loss, expected):
            continue
        weights = [WEIGHTS[weighting](i + 1) for i in range(suite.s)]
        valid = (targets != IGNORE_INDEX).sum((0, 1)).tolist()
        sums = [cross_entropy(logits, y, "sum").item() for y in targets.unbind(-1)]
        total = sum(w * x for w, x in zip(weights, sums, strict=True))
        found = f"With weighting {weighting}, the loss is {loss:.5f} and must be {expected:.5f}:"
        if equal(loss, total / (sum(weights) * math.prod(suite.size))):
            raise Wrong(
                f"{found} ignored targets are in the divisor. Divide by the number of targets that "
                "are not ignored."
            )
        if equal(loss, total / sum(w * n for w, n in zip(weights, valid, strict=True))):
            raise Wrong(
                f"{found} it is one mean over all targets. Take the mean at each offset of the "
                "bag, then the mean over offsets (Appendix A)."
            )
        raise Wrong(f"{found} targets of {IGNORE_INDEX} must not count.")


def _gradient_is_exact(suite: Suite) -> None:
    targets = suite.random(*suite.size, suite.s)
    targets = fold(targets.flatten(1), targets.flatten(1), suite.s)[1]
    for weighting in suite.own.weightings:
        logits, reference = (suite.random_logits().requires_grad_() for _ in range(2))
        suite.own.loss(logits * 1.0, targets, weighting).backward()
        mce(reference, targets, weighting).backward()
        assert logits.grad is not None and reference.grad is not None
        if not torch.allclose(logits.grad, reference.grad, rtol=1e-3, atol=1e-7):
            off = (logits.grad - reference.grad).abs().max() / reference.grad.abs().max()
            raise Wrong(
                f"With weighting {weighting}, the gradient at the logits is off by up to {off:.1e} "
                "of its largest entry."
            )


def _new_weights_know_nothing(suite: Suite) -> None:
    stream = suite.random(suite.size[0], suite.size[1] * suite.s + 1)
    bags, targets = fold(stream[:, :-1], stream[:, 1:], suite.s)
    logits = suite.own.logits(bags)
    loss = suite.own.loss(logits, targets.to(logits.device), "uniform").item()
    expected = math.log(suite.own.vocab_size)
    if abs(loss - expected) > 1:
        raise Wrong(
            f"The loss of new weights is {loss:.2f}, but log V is {expected:.2f}. Look at the "
            "divisor of the loss, and at the initial weights of the LM head."
        )


CHECKS: dict[str, Callable[[Suite], None]] = {
    "Input bags have every token, in order": _inputs_are_bags,
    "The targets of a bag are the whole next bag": _targets_are_next_bags,
    "Targets that are not in the batch are ignored": _unknown_targets_are_ignored,
    "The embedding of a bag is the mean, summed in float32": _bag_is_mean,
    "Logits do not depend on later bags": _later_bags_are_unseen,
    "A bag of equal targets has the loss of one target": _equal_targets_are_one,
    "The loss is the weighted mean over the bag": _loss_is_mean_over_bag,
    "Ignored targets do not count": _ignored_targets_do_not_count,
    "The gradient of the loss is exact": _gradient_is_exact,
    "The loss of new weights is near log V": _new_weights_know_nothing,
}
