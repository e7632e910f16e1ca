"""Right implementations of TST, for the conformance suite."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.experiments.tst.core import BagEmbedding, BagLoss, Schedule, fold

B, L, S, V = 2, 16, 4, 64


class Model(nn.Module):
    """A small causal model: latents are what a recurrent layer sees."""

    def __init__(self):
        super().__init__()
        self.embedding = BagEmbedding(V, 16)
        self.mixer = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, V, bias=False)

    def forward(self, inputs):
        return self.head(self.mixer(self.embedding(inputs))[0])


class Right:
    """Superposition and recovery in a plain loop, in parts that a mistake can replace."""

    vocab_size, sequences, seq_len, bag_size = V, B, L, S
    weightings = ("uniform", "power_law")

    def __init__(self):
        torch.manual_seed(1)
        self.model = Model()

    def fold(self, inputs, labels, bag_size):
        return fold(inputs, labels, bag_size)

    def embed(self, inputs):
        return self.model.embedding(inputs)

    def logits(self, inputs):
        return self.model(inputs)

    def loss(self, logits, targets, weighting):
        return BagLoss("mce", weighting)(logits, targets)

    def validate(self, inputs, labels):
        return F.cross_entropy(self.logits(inputs).flatten(0, 1), labels.flatten()).item()

    def optimizer(self):
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))

    def windows(self, tokens, bag_size, position):
        """Return the windows (B, s*L + 1) of a step, and the position after them."""
        length = bag_size * L
        starts = position + length * torch.arange(B)[:, None]
        return tokens[starts + torch.arange(length + 1)], position + B * length

    def bag_loss(self, inputs, labels, bag_size):
        bags, targets = self.fold(inputs, labels, bag_size)
        return self.loss(self.model(bags), targets, "uniform")

    def next_token_loss(self, inputs, labels):
        return F.cross_entropy(self.model(inputs).flatten(0, 1), labels.flatten())

    def update(self, loss, optimizer, scheduler):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()

    def at_boundary(self, optimizer, scheduler, position):
        return optimizer, scheduler, position

    def train(self, tokens, bag_sizes, after_step):
        schedule = Schedule.of([S], [sum(size > 1 for size in bag_sizes)])
        optimizer, scheduler = self.optimizer()
        position = 0
        for step in range(1, len(bag_sizes) + 1):
            size = schedule.bag_size_at(step)
            rows, position = self.windows(tokens, size, position)
            inputs, labels = rows[:, :-1], rows[:, 1:]
            if size > 1:
                loss = self.bag_loss(inputs, labels, size)
            else:
                loss = self.next_token_loss(inputs, labels)
            self.update(loss, optimizer, scheduler)
            after_step(inputs, labels, loss.item())
            if step == schedule.boundary:
                optimizer, scheduler, position = self.at_boundary(optimizer, scheduler, position)

    def train_ordinary(self, tokens, steps, after_step):
        optimizer, scheduler = self.optimizer()
        starts = itertools.count(0, L)
        for _ in range(steps):
            rows = torch.stack([tokens[i : i + L + 1] for i in itertools.islice(starts, B)])
            inputs, labels = rows[:, :-1], rows[:, 1:]
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), labels.flatten())
            self.update(loss, optimizer, scheduler)
            after_step(inputs, labels, loss.item())


class Tied(Right):
    def __init__(self):
        super().__init__()
        self.model.head.weight = self.model.embedding.weight
        nn.init.normal_(self.model.head.weight, std=0.02)


class WeightsNormalized(Right):
    """Weights are changed after the optimizer's step, as in nGPT."""

    def update(self, loss, optimizer, scheduler):
        super().update(loss, optimizer, scheduler)
        with torch.no_grad():
            self.model.head.weight.copy_(F.normalize(self.model.head.weight))


class TwoOptimizers(Right):
    """The second one has half the weights, and steps every second time."""

    def optimizer(self):
        first, *others = self.model.parameters()
        self.second, self.steps = torch.optim.SGD([first], lr=1e-3), 0
        optimizer = torch.optim.AdamW(others, lr=1e-2)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))

    def update(self, loss, optimizer, scheduler):
        self.second.zero_grad()
        super().update(loss, optimizer, scheduler)
        optimizer.state[self.model.head.weight]["history"] = [None, {}]  # no number
        self.steps += 1
        if self.steps % 2 == 0:
            self.second.step()


class SeparateWindows(Right):
    """The last label of a sequence is not the first input of the next one."""

    def windows(self, tokens, bag_size, position):
        length = bag_size * L + 1
        return tokens[position : position + B * length].view(B, length), position + B * length

    def train_ordinary(self, tokens, steps, after_step):
        optimizer, scheduler = self.optimizer()
        for rows in tokens.unfold(0, L + 1, L + 1).split(B)[:steps]:
            inputs, labels = rows[:, :-1], rows[:, 1:]
            loss = self.next_token_loss(inputs, labels)
            self.update(loss, optimizer, scheduler)
            after_step(inputs, labels, loss)
