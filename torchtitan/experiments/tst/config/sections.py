"""The sections that this package adds to the job config: ``[superposition]`` and others.

The range and the unit of a key are in its annotation. :mod:`.values` checks each value alone;
:mod:`..checks` checks what must fit together. The string below a key is its text in ``--help`` and
in the reference of all keys. Its lines have at most 70 characters, because ``--help`` keeps them.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .allowed import ABOVE_0, BAG_SIZES, WEIGHTS, at_least, each_of, of_each_stage, share


@dataclass(frozen=True)
class Unit:
    """What a number counts, for the reference of all keys."""

    name: str


@dataclass
class Superposition:
    """Token Superposition Training (arXiv 2605.06546)."""

    bag_size: Annotated[int | list[int], BAG_SIZES, Unit("data tokens")] = 1
    """
    The bag size s: the number of contiguous data tokens in a bag.
    1 switches superposition off.
    A list such as [8, 4, 2] divides superposition into stages.
    They run in this order, each with its own bag size.
    """

    step_ratio: Annotated[
        float | list[float] | None,
        of_each_stage(share("in [0, 1)", one=False)),
        Unit("share of training.steps"),
    ] = None
    """
    The step ratio r: the share of training.steps in superposition.
    One number is divided equally among the stages.
    A list gives each stage its own share.
    Set either `step_ratio` or `steps`.
    """

    steps: Annotated[int | list[int] | None, of_each_stage(at_least(0)), Unit("steps")] = None
    """
    The number of superposition steps, less than training.steps.
    One number is divided equally among the stages.
    A list gives each stage its own number of steps.
    Set either `steps` or `step_ratio`.
    """

    mode: Literal["full", "input", "output"] = "full"
    """
    What is in bags:
    - `full`: inputs and targets. Bags in, the next bag out.
    - `input`: inputs only. Bags in, the next single token out.
    - `output`: targets only. Single tokens in, the next s tokens out.
      This mode reads no extra data.
    """

    loss: Literal["mce", "mce_alt", "bce", "hinge"] = "mce"
    """
    The loss of a target bag:
    - `mce`: multi-hot cross-entropy.
    - `mce_alt`: -log of the bag's total probability.
    - `bce`: a binary cross-entropy for each vocabulary entry, summed.
    - `hinge`: a hinge loss for each vocabulary entry, summed.
    The last three are the paper's variants. They treat a bag as a set.
    """

    weighting: Literal["uniform", "power_law", "exponential", "first_token", "fitted"] = "uniform"
    """
    The weight of the i-th token of a target bag, counted from 1:
    - `uniform`: 1.
    - `power_law`: 1/i. The paper recommends it from s = 8.
    - `exponential`: exp(-i).
    - `first_token`: 1 for the first token, 0 for the others.
    - `fitted`: `3.63 + 1.35 * i**-1.25`, the paper's fit to the mutual
      information of token pairs.
    Only `mce` has weights. The other losses need `uniform`.
    """

    scale: Literal["sequence", "batch"] = "sequence"
    """
    How a superposition step reads s times the tokens:
    - `sequence`: sequences of s * training.seq_len data tokens.
      A step costs what an ordinary step costs.
    - `batch`: s times as many sequences, of training.seq_len / s
      latents each. A step costs less, because attention sees shorter
      sequences. Each bag size must divide training.seq_len.
    The mode `output` needs `sequence`.
    """

    reinit_at_recovery: Annotated[list[str], each_of("tok_embeddings", "output")] = field(
        default_factory=list
    )
    """
    Modules with new random weights, and a zero optimizer state, in the
    first recovery step. With an empty list, all weights are kept.
    This is an ablation. With both modules, the paper's 3B run ends
    with a higher loss than its baseline.
    """

    checkpoint_each_stage: bool = False
    """
    Write a full checkpoint at the end of each stage, and never delete it.
    The boundary always has one. Needs checkpoint.enable.
    """

    stop_at_boundary: bool = False
    """
    End the job after the boundary checkpoint. Needs checkpoint.enable.
    Launch it again without this key to train recovery. That can be
    another job, on another number of ranks, or TorchTitan's own trainer.
    """


@dataclass
class TokenShards:
    """The sources of `training.dataset = "token_shards"`, and what happens at their end."""

    paths: list[str] = field(default_factory=list)
    """
    Folders of token shards to mix. Each folder is a source.
    Set either `paths` or training.dataset_path, which is one source.
    """

    weights: Annotated[list[float], WEIGHTS] = field(default_factory=list)
    """
    The part of the tokens that each source gets, in the order of
    `paths`. The parts may have any sum. With an empty list, the parts
    are the numbers of tokens, so that all sources end together.
    """

    at_end: Literal["repeat", "stop"] = "repeat"
    """
    What happens when a source has no tokens left:
    - `repeat`: it is read again from the beginning, in the same order.
    - `stop`: the run ends before the first step that lacks tokens, with
      a checkpoint if checkpoint.enable is true.
    """


@dataclass
class TextDataset:
    """How the text datasets of this package are read, in training and in validation."""

    text_key: str = "text"
    """
    The field (JSON lines) or the column (Parquet) that holds the text.
    `tst tokenize` has the option `--text-key` for it.
    """


@dataclass
class LMHead:
    """How the LM head and the loss are computed, in both phases and without superposition."""

    chunks: Annotated[int, at_least(1), Unit("chunks")] = 1
    """
    The number of chunks that the positions of a micro-batch are cut into.
    The LM head, the loss and their gradients are computed for one chunk
    after the other. Their logits take about `chunks` times less memory,
    in about the same time. 1 is TorchTitan's way, bit for bit.
    8 is a good value for a vocabulary of 100,000 entries or more.
    Pipeline parallelism and a quantized LM head need 1.
    """


@dataclass
class LoadBalance:
    """How the load of the experts is balanced, in a model with a mixture of experts."""

    method: Literal["upstream", "none", "bias", "auxiliary_loss"] = "upstream"
    """
    How the experts are balanced:
    - `upstream`: the model's own method in TorchTitan. This is a bias
      for Llama 4, DeepSeek V3 and gpt-oss, and nothing for Qwen 3.
    - `none`: the experts are not balanced.
    - `bias`: each expert has a bias in the router. After each step it
      moves up or down, towards balance. Qwen 3 in transformers has no
      such bias, so you cannot export a Qwen 3 with it.
    - `auxiliary_loss`: a loss over the global batch, as Qwen 3 was
      trained with. The model needs no bias and can be exported.
    A model without experts needs `upstream`.
    """

    coefficient: Annotated[float, ABOVE_0] = 1e-3
    """
    For `bias`: how far a bias moves in a step.
    For `auxiliary_loss`: the weight of each layer's loss.
    The other methods do not use it.
    """


@dataclass
class Resilience:
    """What to do about contradictions, damaged checkpoints, and losses that are not finite."""

    allow_config_mismatch: bool = False
    """
    Resume although the config contradicts the checkpoint, with the
    values of the config. Without this key, such a launch stops and names
    both values. The values are bag sizes, steps of superposition, mode,
    sequence length, batch size, model, data, tokenizer and the like.
    """

    skip_damaged: bool = False
    """
    Rename a damaged checkpoint to `damaged-N`, where N is its step, and
    resume from the one before it. Without this key, the launch stops and
    names the damaged file.
    """

    max_skipped_steps: Annotated[int, at_least(0), Unit("steps")] = 0
    """
    How many steps of a run may be skipped because their loss or gradient
    norm is not finite. The next such step stops the run.
    With optimizer.early_step_in_backward, this must be 0.
    """
