"""The plain PyTorch example, as the conformance suite sees it.

    tst conformance tests/examples/conformance_of_plain_loop.py

It trains by the example's own ``train``, and without TST by a loop of its own here.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from loading import load_example
from torch import nn

B, L, S, V = 2, 16, 4, 256
LEARNING_RATE = 1e-2
AfterStep = Callable[[torch.Tensor, torch.Tensor, float], None]

example = load_example("plain_loop")


class TST:
    """The example with its own model."""

    vocab_size, sequences, seq_len, bag_size = V, B, L, S
    weightings = ("uniform",)

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = example.Model()

    def fold(
        self, inputs: torch.Tensor, labels: torch.Tensor, bag_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return example.fold(inputs, labels, bag_size)

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model.tok_embeddings(inputs)

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, weighting: str) -> torch.Tensor:
        return example.loss_of(logits, targets)

    def validate(self, inputs: torch.Tensor, labels: torch.Tensor) -> float:
        windows = torch.cat([inputs, labels[:, -1:]], dim=1)  # (B, L + 1)
        return example.validate(self.model, windows).item()

    def train(self, tokens: torch.Tensor, bag_sizes: Sequence[int], after_step: AfterStep) -> None:
        in_bags = [size for size in bag_sizes if size > 1]
        schedule = example.Schedule.of(in_bags, [1] * len(in_bags))
        held_out = tokens[: L + 1].view(1, -1)
        with tempfile.TemporaryDirectory() as folder, small(), reporting(after_step):
            args = (self.model, tokens, held_out, schedule, len(bag_sizes), Path(folder))
            example.train(*args, lr=LEARNING_RATE)

    def train_ordinary(self, tokens: torch.Tensor, steps: int, after_step: AfterStep) -> None:
        """Train without anything of the example except the classes of its model."""
        weight = self.model.tok_embeddings.weight
        self.model.tok_embeddings = nn.Embedding(V, weight.shape[1], _weight=weight.detach())
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
        batches = tokens.unfold(0, L + 1, L + 1).split(B)  # of windows (B, L + 1)
        for step, windows in enumerate(batches[:steps], 1):
            inputs, labels = windows[:, :-1], windows[:, 1:]
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            factor = min(1, step / (0.05 * steps), (steps + 1 - step) / (0.2 * steps))
            optimizer.param_groups[0]["lr"] = factor * LEARNING_RATE
            optimizer.step()
            after_step(inputs, labels, loss.item())


@contextlib.contextmanager
def small():
    """Give the example small batches, and keep what it prints off the terminal."""
    with mock.patch.multiple(example, B=B, L=L), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def reporting(after_step: AfterStep):
    """Call a function after each step of the example, with its tokens, next tokens and loss."""
    train_step = example.train_step

    def reporting_step(model, optimizer, scheduler, bag_size, inputs, labels):
        loss = train_step(model, optimizer, scheduler, bag_size, inputs, labels)
        after_step(inputs, labels, loss.item())
        return loss

    with mock.patch.object(example, "train_step", reporting_step):
        yield
