"""The loop of plain_loop.py, described for the conformance suite.

Run ``tst conformance docs/examples/plain_loop_conformance.py``.
"""

import contextlib
import io
import tempfile
from pathlib import Path
from unittest import mock

import plain_loop
import torch
import torch.nn.functional as F
from torch import nn

plain_loop.B, plain_loop.L = 2, 16  # a small batch is enough


class TST:
    """The loop, with the members that the suite needs."""

    vocab_size, sequences, seq_len, bag_size = 256, 2, 16, 4
    weightings = ("uniform",)

    def __init__(self):
        torch.manual_seed(0)
        self.model = plain_loop.Model()

    def fold(self, inputs, labels, bag_size):
        return plain_loop.fold(inputs, labels, bag_size)

    def embed(self, inputs):
        return self.model.tok_embeddings(inputs)

    def logits(self, inputs):
        return self.model(inputs)

    def loss(self, logits, targets, weighting):
        return plain_loop.loss_of(logits, targets)

    def validate(self, inputs, labels):
        return plain_loop.validate(self.model, torch.cat([inputs, labels[:, -1:]], 1))

    def train(self, tokens, bag_sizes, after_step):
        """Run the loop itself. Its train_step also tells the suite what it was given."""
        superposition = [size for size in bag_sizes if size > 1]
        schedule = plain_loop.Schedule.of(superposition, [1] * len(superposition))
        train_step = plain_loop.train_step

        def reporting_step(model, optimizer, scheduler, bag_size, inputs, labels):
            loss = train_step(model, optimizer, scheduler, bag_size, inputs, labels)
            after_step(inputs, labels, loss)
            return loss

        held_out = tokens[: self.seq_len + 1].view(1, -1)
        with (
            mock.patch.object(plain_loop, "train_step", reporting_step),
            contextlib.redirect_stdout(io.StringIO()),
            tempfile.TemporaryDirectory() as folder,
        ):
            args = self.model, tokens, held_out, schedule, len(bag_sizes), Path(folder)
            plain_loop.train(*args)

    def train_ordinary(self, tokens, steps, after_step):
        """Train without TST: an ordinary embedding, the same optimizer and learning rates."""
        embedding = nn.Embedding(*self.model.tok_embeddings.weight.shape, device="meta")
        embedding.weight = self.model.tok_embeddings.weight  # the same, as if it were tied
        self.model.tok_embeddings = embedding
        optimizer = torch.optim.AdamW(self.model.parameters(), 2e-3, betas=(0.9, 0.95))
        batches = tokens.unfold(0, self.seq_len + 1, self.seq_len + 1).split(self.sequences)
        for step in range(steps):
            inputs, labels = batches[step][:, :-1], batches[step][:, 1:]
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            factor = min(1, 20 * (step + 1) / steps, 5 * (1 - step / steps))
            optimizer.param_groups[0]["lr"] = 2e-3 * factor
            optimizer.step()
            after_step(inputs, labels, loss)
