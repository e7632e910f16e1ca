"""Train a small causal language model by Token Superposition Training (TST) in plain PyTorch.

The tokens are the bytes of text files, so you need no tokenizer::

    python docs/examples/plain_loop.py FILE...                                    # both phases
    python docs/examples/plain_loop.py FILE... --step-ratio 0 --out outputs/base  # without TST
    python docs/examples/plain_loop.py FILE... --resume outputs/plain_loop/step-300.pt

What TST adds is marked "TST". Nothing is reset at the boundary. A run resumes with its own options.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

# or from your copy: tst core copy FOLDER
from torchtitan.experiments.tst.core import BagEmbedding, BagLoss, Schedule, fold

B, L = 16, 128  # sequences of a step, and their length: tokens, or latents in superposition


class Model(nn.Module):
    """A causal transformer. Its positions count tokens, or latents in superposition."""

    def __init__(self, vocab_size: int = 256, dim: int = 64, layers: int = 2):
        super().__init__()
        self.tok_embeddings = BagEmbedding(vocab_size, dim)  # TST: instead of nn.Embedding
        self.positions = nn.Parameter(torch.zeros(L, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), False)
        self.output = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, inputs):
        """Return logits (B, L, V) for tokens (B, L) or for bags (B, L, s)."""
        x = self.tok_embeddings(inputs) + self.positions[: inputs.shape[1]]  # (B, L, d)
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], x.device)
        return self.output(self.layers(x, mask, is_causal=True))


def batch_at(position: int, tokens, bag_size: int):
    """Cut a step's windows out of tokens (N,); return inputs and next tokens, both (B, s*L)."""
    length = bag_size * L + 1  # TST: s times as long
    windows = tokens[position : position + B * length].view(B, length).long()
    return windows[:, :-1], windows[:, 1:]


def loss_of(logits, labels):
    """Return the mean loss of logits (B, L, V) for next tokens (B, L) or next bags (B, L, s)."""
    if labels.ndim == 3:
        return BagLoss()(logits, labels)  # TST: superposition
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # recovery and validation


def train_step(model, optimizer, scheduler, bag_size: int, inputs, labels):
    """Train on inputs and next tokens (B, s*L), and return the loss."""
    if bag_size > 1:
        inputs, labels = fold(inputs, labels, bag_size)  # TST: both (B, s*L) -> (B, L, s)
    loss = loss_of(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    return loss.detach()


@torch.no_grad()
def validate(model, windows):
    """Return the next-token loss of held-out windows (N, L + 1), in both phases."""
    return loss_of(model(windows[:, :-1]), windows[:, 1:])


def train(model, tokens, held_out, schedule, steps, folder, resume=None, lr=2e-3, every=100):
    """Train on tokens (N,) in both phases. Print losses, and write checkpoints to a folder."""
    needed = B * sum(schedule.bag_size_at(step) * L + 1 for step in range(1, steps + 1))
    if len(tokens) < needed:
        raise ValueError(f"{steps} steps read {needed} tokens, but the text has {len(tokens)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95))
    # Warm-up, stable, decay: over the steps of both phases, with no new warm-up at the boundary
    scheduler = LambdaLR(optimizer, lambda n: min(1, 20 * (n + 1) / steps, 5 * (1 - n / steps)))
    parts, done, position = {"model": model, "optimizer": optimizer, "scheduler": scheduler}, 0, 0
    if resume:
        state = torch.load(resume, map_location=tokens.device)
        done, position = state["step"], state["position"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step in range(done + 1, steps + 1):
        s = schedule.bag_size_at(step)  # TST: the bag size, 1 in recovery
        loss = train_step(model, optimizer, scheduler, s, *batch_at(position, tokens, s))
        position += B * (s * L + 1)
        if step % every == 0 or step in (schedule.boundary, steps):
            losses = f"loss {loss:.4f}  validation loss {validate(model, held_out):.4f}"
            print(f"step {step}  {schedule.phase(step)}  {losses}", flush=True)
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"step": step, "position": position}, folder / "partial.pt")
            (folder / "partial.pt").replace(folder / f"step-{step}.pt")  # never half a file


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for name, default in {"--bag-size": 4, "--step-ratio": 0.3, "--steps": 1000}.items():
        parser.add_argument(name, type=type(default), default=default)
    parser.add_argument("--out", type=Path, default=Path("outputs/plain_loop"))
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = bytearray(b"".join(file.read_bytes() for file in args.files))
    pieces = torch.frombuffer(text, dtype=torch.uint8).split(1024)  # shuffled: batches are diverse
    stream = torch.cat([pieces[i] for i in torch.randperm(len(pieces))]).to(device)
    tokens, held_out = stream[: -8 * B * (L + 1)], stream[-8 * B * (L + 1) :].view(-1, L + 1).long()
    schedule = Schedule.of([args.bag_size], [round(args.step_ratio * args.steps)])  # TST
    args.out.mkdir(parents=True, exist_ok=True)
    train(Model().to(device), tokens, held_out, schedule, args.steps, args.out, args.resume)
