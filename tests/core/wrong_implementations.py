"""Wrong implementations of TST, and what the conformance suite says of each."""

import torch
import torch.nn.functional as F
from implementations import B, L, Right, S, Tied, V
from torch import nn

from torchtitan.experiments.tst.core import BagEmbedding


class TailsCounted(Right):
    def fold(self, inputs, labels, bag_size):
        bags, targets = super().fold(inputs, labels, bag_size)
        return bags, targets.clamp_min(0)


class LastBagCut(Right):
    def fold(self, inputs, labels, bag_size):
        return tuple(folded[:, :-1] for folded in super().fold(inputs, labels, bag_size))


class LabelsCut(Right):
    """Labels of an ordinary sequence, for a sequence that is s times longer."""

    def fold(self, inputs, labels, bag_size):
        labels = labels.clone()
        labels[:, labels.shape[1] // bag_size :] = -100
        return super().fold(inputs, labels, bag_size)


class ShiftedByOne(Right):
    def fold(self, inputs, labels, bag_size):
        return super().fold(inputs, F.pad(labels[:, 1:], (0, 1), value=-100), bag_size)


class OneTooFar(Right):
    """The targets begin one token late, and the tail has one more token than the batch."""

    def fold(self, inputs, labels, bag_size):
        bags, targets = super().fold(inputs, labels, bag_size)
        return bags, torch.where(targets == -100, targets, targets + 1)


class PredictsItself(Right):
    def fold(self, inputs, labels, bag_size):
        return super().fold(inputs, labels, bag_size)[0], labels.unflatten(1, (-1, bag_size))


class AcrossSequences(Right):
    """The batch is shifted as one long sequence."""

    def fold(self, inputs, labels, bag_size):
        _, targets = super().fold(inputs, labels.reshape(1, -1), bag_size)
        return inputs.unflatten(1, (-1, bag_size)), targets.unflatten(1, (len(inputs), -1))[0]


class BagsInterleaved(Right):
    def fold(self, inputs, labels, bag_size):
        _, targets = super().fold(inputs, labels, bag_size)
        return inputs.unflatten(1, (bag_size, -1)).transpose(1, 2), targets


class MeanInBfloat16(Right):
    def embed(self, inputs):
        tokens = F.embedding(inputs, self.model.embedding.weight)
        return tokens.bfloat16().mean(2).float() if inputs.ndim == 3 else tokens


class SumOfBag(Right):
    def embed(self, inputs):
        return self.model.embedding(inputs) * (S if inputs.ndim == 3 else 1)


class SeesTheNextLatent(Right):
    """Latents see each other in pairs, as with a causal mask of tokens."""

    def logits(self, inputs):
        logits = super().logits(inputs)
        return (
            logits
            + self.model.embedding(inputs)
            .unflatten(1, (-1, 2))
            .mean((2, 3))[:, torch.arange(L) // 2, None]
        )


class SeesTheFuture(Right):
    def logits(self, inputs):
        return super().logits(inputs) + self.model.embedding(inputs).mean()


def offset_losses(logits, targets, **options):
    """Return the cross-entropy at each offset of the bag."""
    z = logits.flatten(0, 1)
    return torch.stack([F.cross_entropy(z, y.flatten(), **options) for y in targets.unbind(-1)])


class WeightsNotNormalized(Right):
    def loss(self, logits, targets, weighting):
        weights = 1 / torch.arange(1, S + 1)
        losses = offset_losses(logits, targets)
        return losses.mean() if weighting == "uniform" else (weights * losses).sum()


class SumOverBag(Right):
    def loss(self, logits, targets, weighting):
        return S * super().loss(logits, targets, weighting)


class FirstTargetOnly(Right):
    def loss(self, logits, targets, weighting):
        return super().loss(logits, targets[..., :1], weighting)


class IgnoredInDivisor(Right):
    weightings = ("uniform",)

    def loss(self, logits, targets, weighting):
        return offset_losses(logits, targets, reduction="sum").sum() / targets.numel()


class IgnoredInDivisorOfPowerLaw(Right):
    def loss(self, logits, targets, weighting):
        if weighting == "uniform":
            return super().loss(logits, targets, weighting)
        weights = 1 / torch.arange(1, S + 1)
        sums = offset_losses(logits, targets, reduction="sum")
        return (weights * sums).sum() / (weights.sum() * B * L)


class OneMeanOverAll(Right):
    weightings = ("uniform",)

    def loss(self, logits, targets, weighting):
        return offset_losses(logits, targets, reduction="sum").sum() / (targets != -100).sum()


class IgnoredIsToken0(Right):
    def loss(self, logits, targets, weighting):
        return super().loss(logits, targets.clamp_min(0), weighting)


class GradientTooLarge(Right):
    def loss(self, logits, targets, weighting):
        loss = super().loss(logits, targets, weighting)
        return 2 * loss - loss.detach()


class LargeWeights(Right):
    def __init__(self):
        super().__init__()
        nn.init.normal_(self.model.head.weight, std=8)


class BagLossAtSize1(Right):
    """At bag size 1 the bag loss is right, but not bit for bit the engine's."""

    def next_token_loss(self, inputs, labels):
        return self.loss(self.model(inputs), labels[..., None], "uniform")


class OtherLossInTraining(Right):
    def bag_loss(self, inputs, labels, bag_size):
        return S * super().bag_loss(inputs, labels, bag_size)


class LastSequenceTrains(Right):
    """Gradients of the micro-batches before the last one are lost; the loss is right."""

    def bag_loss(self, inputs, labels, bag_size):
        whole = super().bag_loss(inputs, labels, bag_size)
        last = super().bag_loss(inputs[1:], labels[1:], bag_size)
        return whole.detach() + last - last.detach()


class LogitsWithoutGradient(Right):
    @torch.no_grad()
    def logits(self, inputs):
        return super().logits(inputs)


class Untied(Tied):
    """The bags' embedding is a copy, and the optimizer has both."""

    def train(self, tokens, bag_sizes, after_step):
        weight = self.model.embedding.weight.detach().clone()
        self.model.embedding = BagEmbedding(V, 16, _weight=weight)
        super().train(tokens, bag_sizes, after_step)


class AnotherWeight(Right):
    """From the boundary on, the model has an embedding that the optimizer does not know."""

    def at_boundary(self, optimizer, scheduler, position):
        weight = self.model.embedding.weight.detach().clone()
        self.model.embedding = BagEmbedding(V, 16, _weight=weight)
        return optimizer, scheduler, position


class NeverSwitches(Right):
    """Recovery has the loss of bags, on the right tokens."""

    def next_token_loss(self, inputs, labels):
        return self.bag_loss(inputs, labels, S)


class Ascends(Right):
    def update(self, loss, optimizer, scheduler):
        super().update(-loss, optimizer, scheduler)


class Dropout(Right):
    def logits(self, inputs):
        return F.dropout(super().logits(inputs))


class RandomWindows(Right):
    def windows(self, tokens, bag_size, position):
        torch.manual_seed(position)
        start = int(torch.randint(len(tokens) // 2, ()))
        return super().windows(tokens, bag_size, start)[0], position + 1


class BoundaryOneLate(Right):
    def train(self, tokens, bag_sizes, after_step):
        sizes = [bag_sizes[0], *bag_sizes[:-1]]
        super().train(tokens, sizes, after_step)


class PositionInLatents(Right):
    """The position advances by latents."""

    def windows(self, tokens, bag_size, position):
        return super().windows(tokens, bag_size, position)[0], position + B * L


class SkipsTheBeginning(Right):
    def windows(self, tokens, bag_size, position):
        return super().windows(tokens[100:], bag_size, position)


class SkipsAtBoundary(Right):
    def at_boundary(self, optimizer, scheduler, position):
        return optimizer, scheduler, position + 1


class ShortSteps(Right):
    """A superposition step reads as many tokens as an ordinary step."""

    def windows(self, tokens, bag_size, position):
        return super().windows(tokens, 1, position)


class OptimizerReset(Right):
    def at_boundary(self, optimizer, scheduler, position):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        fresh = torch.optim.AdamW(optimizer.param_groups)
        scheduler.optimizer = fresh
        return fresh, scheduler, position


class MomentsLost(Right):
    def at_boundary(self, optimizer, scheduler, position):
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
        return optimizer, scheduler, position


class EmbeddingReset(Right):
    def at_boundary(self, optimizer, scheduler, position):
        nn.init.normal_(self.model.embedding.weight)
        return optimizer, scheduler, position


class NewWarmup(Right):
    def at_boundary(self, optimizer, scheduler, position):
        scheduler.last_epoch = 0
        return optimizer, scheduler, position


class ValidatesOnBags(Right):
    def validate(self, inputs, labels):
        bags, targets = self.fold(inputs, labels, S)
        return self.loss(self.logits(bags), targets, "uniform").item()


WRONG = [
    (BagsInterleaved, "Input bags have every token, in order", "must have its tokens j*s to"),
    (LastBagCut, "Input bags have every token, in order", "shape (2, 15, 4)"),
    (LastBagCut, "The targets of a bag are the whole next bag", "Do not cut labels"),
    (LabelsCut, "The targets of a bag are the whole next bag", "Keep all labels"),
    (ShiftedByOne, "The targets of a bag are the whole next bag", "offset in tokens is 1."),
    (PredictsItself, "The targets of a bag are the whole next bag", "offset in tokens is -3."),
    (TailsCounted, "Targets that are not in the batch are ignored", "They are [0, 0, 0]"),
    (AcrossSequences, "Targets that are not in the batch are ignored", "of another sequence"),
    (MeanInBfloat16, "The embedding of a bag is the mean, summed in float32", "Sum in float32"),
    (SumOfBag, "The embedding of a bag is the mean, summed in float32", "Divide it by s"),
    (SeesTheFuture, "Logits do not depend on later bags", "must be causal"),
    (WeightsNotNormalized, "A bag of equal targets has the loss of one target", "power_law"),
    (SumOverBag, "A bag of equal targets has the loss of one target", "by the sum of the weights"),
    (FirstTargetOnly, "The loss is the weighted mean over the bag", "must be 6.08456"),
    (IgnoredInDivisor, "Ignored targets do not count", "ignored targets are in the divisor"),
    (OneMeanOverAll, "Ignored targets do not count", "it is one mean over all targets"),
    (IgnoredIsToken0, "Ignored targets do not count", "targets of -100 must not count"),
    (GradientTooLarge, "The gradient of the loss is exact", "off by up to 1.0e+00"),
    (LargeWeights, "The loss of new weights is near log V", "log V is 4.16"),
    (SeesTheNextLatent, "Logits do not depend on later bags", "must be causal"),
    (IgnoredInDivisorOfPowerLaw, "Ignored targets do not count", "in the divisor"),
    (NeverSwitches, "The loss of a step is that of its tokens", "Step 3 (recovery) reports"),
    (Ascends, "The gradient of a step is that of its loss", "step 1 has a cosine of -1.000"),
    (AnotherWeight, "The gradient of a step is that of its loss", "Step 3 gives gradients to"),
    (SkipsTheBeginning, "Training reads every token once, in order", "begins at token 100"),
    (Dropout, "Logits do not depend on later bags", "Switch dropout off"),
    (Untied, "Bag size 1 is the engine's own run, bit for bit", "no longer tied"),
    (LastSequenceTrains, "The gradient of a step is that of its loss", "each micro-batch add"),
    (LogitsWithoutGradient, "The gradient of a step is that of its loss", "under torch.no_grad"),
    (RandomWindows, "Training reads every token once, in order", "samples windows at random"),
    (BoundaryOneLate, "A superposition step has the latents of an ordinary step", "from 1"),
    (BagLossAtSize1, "Bag size 1 is the engine's own run, bit for bit", "Step 1: the loss is"),
    (OtherLossInTraining, "The loss of a step is that of its tokens", "fold, embed and normalize"),
    (PositionInLatents, "Training reads every token once, in order", "begins at token 32, but"),
    (SkipsAtBoundary, "Training reads every token once, in order", "of step 3 begins at token 257"),
    (ShortSteps, "A superposition step has the latents of an ordinary step", "must read 128"),
    (OptimizerReset, "Weights and optimizer state pass the boundary", "lost at the boundary: step"),
    (MomentsLost, "Weights and optimizer state pass the boundary", "the boundary: exp_avg."),
    (EmbeddingReset, "Weights and optimizer state pass the boundary", "Keep all of them"),
    (NewWarmup, "One learning-rate schedule covers both phases", "Step 4 has learning rates"),
    (ValidatesOnBags, "Validation is next-token loss in both phases", "After step 1 (bags of 4)"),
]  # fmt: skip
