"""The interface that describes an implementation, and how it is read from a file."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

NAME = "TST"  # of the class in a file
_WHERE = f"class Implementation in {Path(__file__)}"

Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and next tokens, or bags and targets
AfterStep = Callable[[torch.Tensor, torch.Tensor, float | torch.Tensor], None]


class InterfaceError(ValueError):
    """A description cannot be checked; the message says what to change in it."""


class Implementation(Protocol):
    """What the suite needs from an implementation.

    A new object has the weights that training begins with, the same each time. The methods use the
    present weights, also while :meth:`train` calls ``after_step``, and without dropout. Their
    arguments are on the CPU, token ids are int64, and results may be on any device. Training is
    deterministic, and its loss has no other term than the cross-entropy.

    Attributes:
        vocab_size: V, entries of the vocabulary, 32 or more.
        sequences: B, sequences of a step, over all its micro-batches; 2 or more.
        seq_len: L, tokens of a sequence in an ordinary step, and latents of one in superposition,
            8 or more.
        bag_size: s, tokens of a bag, 2 or more.
        weightings: weightings of the loss to check, of "uniform" and "power_law" (Appendix D).
    """

    vocab_size: int
    sequences: int
    seq_len: int
    bag_size: int
    weightings: Sequence[str]

    def fold(self, inputs: torch.Tensor, labels: torch.Tensor, bag_size: int) -> Batch:
        """Fold tokens and next tokens, both (B, L*s), into bags and targets, both (B, L, s).

        Targets that are not in the batch are -100.
        """

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (B, L, d) of bags (B, L, s) or of tokens (B, L)."""

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of all positions (B, L, V), for bags (B, L, s) or for tokens (B, L).

        The suite differentiates them, so do not compute them under ``torch.no_grad``.
        """

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, weighting: str) -> torch.Tensor:
        """Return the loss of superposition, a scalar, of logits (B, L, V) and targets (B, L, s)."""

    def validate(self, inputs: torch.Tensor, labels: torch.Tensor) -> float | torch.Tensor:
        """Return the validation loss of tokens (B, L) and next tokens (B, L)."""

    def train(self, tokens: torch.Tensor, bag_sizes: Sequence[int], after_step: AfterStep) -> None:
        """Train one step for each bag size, with uniform weighting, on tokens (N,) in their order.

        Bag sizes [4, 4, 1, 1] are two steps of superposition and two of recovery. After each
        optimizer step, call ``after_step(inputs, labels, loss)`` with the tokens and next tokens of
        all sequences of the step, both (B, T) and not folded, and the training loss.
        """

    def train_ordinary(self, tokens: torch.Tensor, steps: int, after_step: AfterStep) -> None:
        """Train as your engine does without TST. The rest is as in :meth:`train`."""


def load(path: Path) -> type[Implementation]:
    """Return the class ``TST`` of a Python file.

    Raises:
        InterfaceError: if there is no such file, or no such class in it, or if the class lacks a
            method of :class:`Implementation`.
    """
    spec = importlib.util.spec_from_file_location(f"implementation_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InterfaceError(
            f"{path} is not a Python file; give the file that defines the class {NAME}"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))  # as for python FILE
    spec.loader.exec_module(module)
    found = getattr(module, NAME, None)
    if not isinstance(found, type):
        raise InterfaceError(
            f"{path} defines no class {NAME}; it must have what {_WHERE} describes"
        )
    methods = [name for name in vars(Implementation) if not name.startswith("_")]
    if missing := [name for name in methods if not hasattr(found, name)]:
        raise InterfaceError(
            f"{NAME} of {path} lacks {', '.join(missing)}; {_WHERE} describes them"
        )
    return found
