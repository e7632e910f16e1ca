"""Fold ordinary batches into bags (paper, Section 3 and Appendix A).

Labels are ordinary next-token labels: ``labels[:, i]`` is the token after ``inputs[:, i]``.
"""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
MODES = ("full", "input", "output")


def fold(
    inputs: torch.Tensor, labels: torch.Tensor, bag_size: int, mode: str = "full"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold an ordinary batch into a batch of the superposition phase.

    Args:
        inputs: token ids (B, T).
        labels: next-token ids (B, T), ``IGNORE_INDEX`` where there is none.
        bag_size: tokens per bag, s.
        mode: "full": bags in, next bag out; "input": bags in, the next single token out;
            "output": single tokens in, the next s tokens out.

    Returns:
        Inputs (B, T/s, s), or (B, T) in mode "output"; labels (B, T/s, s), (B, T/s, 1) in mode
        "input", (B, T, s) in mode "output". The last labels of a sequence are ``IGNORE_INDEX``,
        because their tokens are not in the batch.

    Raises:
        ValueError: if T is not a multiple of s, or if the mode is unknown.
    """
    if mode == "full":
        return _bags(inputs, bag_size), _bags(_shift(labels, bag_size), bag_size)
    if mode == "input":
        return _bags(inputs, bag_size), _bags(labels, bag_size)[..., -1:]
    if mode == "output":
        padded = F.pad(labels, (0, bag_size - 1), value=IGNORE_INDEX)  # (B, T + s-1)
        return inputs, padded.unfold(1, bag_size, 1)  # -> (B, T, s)
    raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")


def _bags(tokens: torch.Tensor, bag_size: int) -> torch.Tensor:
    if tokens.shape[1] % bag_size:
        raise ValueError(
            f"the sequence length {tokens.shape[1]} must be a multiple of the bag size {bag_size}"
        )
    return tokens.unflatten(1, (-1, bag_size))  # (B, l*s) -> (B, l, s)


def _shift(labels: torch.Tensor, bag_size: int) -> torch.Tensor:
    """Shift the labels left by s - 1, so that each bag of labels begins with the next bag."""
    return F.pad(labels[:, bag_size - 1 :], (0, bag_size - 1), value=IGNORE_INDEX)


def document_ids(bags: torch.Tensor, eos_id: int | None) -> torch.Tensor:
    """Return one token id for each bag, for code that finds documents by their end token.

    A bag belongs to the document of its first token. If a document ends inside a bag, the next
    document begins with the next bag.

    Args:
        bags: token ids (B, L, s).
        eos_id: id of the token that ends a document; None if there is none.

    Returns:
        Token ids (B, L): ``eos_id`` for a bag that contains it, else the bag's first token.
    """
    first = bags[..., 0]
    if eos_id is None:
        return first
    return first.masked_fill((bags == eos_id).any(-1), eos_id)
