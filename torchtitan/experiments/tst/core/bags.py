"""Folding ordinary batches into bags (paper, Section 3 and Appendix A).

Labels are ordinary next-token labels: ``labels[:, i]`` is the token after ``inputs[:, i]``.
"""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
MODES = ("full", "input", "output")


def fold(
    inputs: torch.Tensor, labels: torch.Tensor, bag_size: int, mode: str = "full"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn an ordinary batch into one of the superposition phase.

    Args:
        inputs: token ids (B, T).
        labels: next-token ids (B, T), ``IGNORE_INDEX`` where there is none.
        bag_size: s.
        mode: "full": bags in, next bag out; "input": bags in, the next single token out;
            "output": single tokens in, the next s tokens out.

    Returns:
        Inputs (B, T/s, s), or (B, T) in mode "output"; labels (B, T/s, s), (B, T/s, 1) in mode
        "input", (B, T, s) in mode "output". The last labels of a sequence, whose tokens are not
        in the batch, are ``IGNORE_INDEX``.

    Raises:
        ValueError: if bags of s do not divide T, or for an unknown mode.
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
            f"a sequence of {tokens.shape[1]} tokens does not divide into bags of {bag_size}"
        )
    return tokens.unflatten(1, (-1, bag_size))  # (B, l*s) -> (B, l, s)


def _shift(labels: torch.Tensor, bag_size: int) -> torch.Tensor:
    """Labels of the first token of the next bag come to the front of each bag."""
    return F.pad(labels[:, bag_size - 1 :], (0, bag_size - 1), value=IGNORE_INDEX)


def document_ids(bags: torch.Tensor, eos_id: int | None) -> torch.Tensor:
    """Single token ids that stand for bags where documents are told apart by their ends.

    A bag belongs to the document of its first token: where a document ends in a bag, the next
    document begins with the next bag, for everything that takes ``eos_id`` for the end of one.

    Args:
        bags: token ids (B, L, s).
        eos_id: of the token that ends a document; None if there is none.

    Returns:
        (B, L): ``eos_id`` for a bag with an end in it, else the bag's first token.
    """
    first = bags[..., 0]
    if eos_id is None:
        return first
    return first.masked_fill((bags == eos_id).any(-1), eos_id)
