"""The sections of this package in the job config: ``[superposition]`` and its neighbors.

A range stands next to its field. :mod:`.values` checks each value on its own; :mod:`..checks`,
what must fit together.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchtitan.config import JobConfig as UpstreamJobConfig

from .allowed import ABOVE_0, BAG_SIZES, WEIGHTS, at_least, each_of, of_each_stage, share

SECTION, TOKEN_SHARDS = "superposition", "token_shards"
TEXT_DATASET, LM_HEAD, RESILIENCE = "text_dataset", "lm_head", "resilience"
LOAD_BALANCE = "load_balance"


@dataclass
class Superposition:
    """Token Superposition Training (arXiv 2605.06546)."""

    bag_size: Annotated[int | list[int], BAG_SIZES] = 1
    """
    s, the number of contiguous data tokens in a bag. 1 switches superposition off. A list, such as
    [8, 4, 2], divides superposition into stages, each with its bag size, in this order.
    """

    step_ratio: Annotated[
        float | list[float] | None, of_each_stage(share("in [0, 1)", one=False))
    ] = None
    """
    r, the share of training.steps in superposition, in [0, 1). Stages have equal parts of it; a
    list gives each its own share. Give this or `steps`.
    """

    steps: Annotated[int | list[int] | None, of_each_stage(at_least(0))] = None
    """
    The number of steps in superposition, less than training.steps. Stages have equal parts of it; a
    list gives each its own number. Give this or `step_ratio`.
    """

    mode: Literal["full", "input", "output"] = "full"
    """
    'full': bags in, next bag out. 'input': bags in, next single token out. 'output': single
    tokens in, next s tokens out, which reads no extra data.
    """

    loss: Literal["mce", "mce_alt", "bce", "hinge"] = "mce"
    """
    'mce': multi-hot cross-entropy. 'mce_alt': -log of the bag's total probability. 'bce', 'hinge':
    one binary decision for each vocabulary entry, summed over the vocabulary.
    """

    weighting: Literal["uniform", "power_law", "exponential", "first_token", "fitted"] = "uniform"
    """
    Weight of the i-th token of the target bag in the 'mce' loss: 1; 1/i; exp(-i); 1 for the first
    token only; 3.63 + 1.35 * i**-1.25, the paper's fit to the mutual information of token pairs.
    """

    scale: Literal["sequence", "batch"] = "sequence"
    """
    How a superposition step reads s times the tokens. 'sequence': data sequences of s *
    training.seq_len tokens, so that a step costs what an ordinary one costs. 'batch': s times the
    sequences, each of training.seq_len / s latents.
    """

    reinit_at_recovery: Annotated[list[str], each_of("tok_embeddings", "output")] = field(
        default_factory=list
    )
    """
    Modules to initialise afresh, with their optimizer state, before the first recovery step, an
    ablation that costs most of the gain: 'tok_embeddings', 'output'. Empty to keep all weights.
    """

    checkpoint_each_stage: bool = False
    """
    Write and keep a full checkpoint at the end of every stage. The boundary always has one.
    """

    stop_at_boundary: bool = False
    """
    End the job after the boundary checkpoint. Launched again without it, recovery goes on from
    there: as another job, on another number of ranks, or with upstream's own trainer.
    """


@dataclass
class TokenShards:
    """The sources of `training.dataset = "token_shards"`."""

    paths: list[str] = field(default_factory=list)
    """Folders of token shards to mix. Empty if training.dataset_path is the only one."""

    weights: Annotated[list[float], WEIGHTS] = field(default_factory=list)
    """
    For each of `paths` its part of the tokens read, of any sum. Empty for the numbers of tokens
    that they have, with which all of them end together.
    """

    at_end: Literal["repeat", "stop"] = "repeat"
    """
    When a source has no tokens left: 'repeat' begins it anew, in the same order; 'stop' ends the
    run before the step that it is too short for, with a checkpoint.
    """


@dataclass
class TextDataset:
    """How the text datasets of this package are read, in training and in validation."""

    text_key: str = "text"
    """
    The field of a record (JSON lines) or the column (Parquet) that holds the text, as `--text-key`
    of `tst tokenize`.
    """


@dataclass
class LMHead:
    """How LM head and loss are computed, in both phases and without superposition."""

    chunks: Annotated[int, at_least(1)] = 1
    """
    Into how many chunks to cut the positions of a micro-batch, so that the logits of one chunk at a
    time are in memory: about so many times less memory for them, in the same time. 1 is
    upstream's way, bit for bit; with a vocabulary of 100,000 and more, 8 is a good value.
    """


@dataclass
class LoadBalance:
    """How to balance the load of the experts of an MoE model."""

    method: Literal["upstream", "none", "bias", "auxiliary_loss"] = "upstream"
    """
    'upstream': the model's method in TorchTitan, which is 'bias' for Llama 4, DeepSeek V3 and
    gpt-oss, and 'none' for Qwen 3. 'bias': after each step, a bias in the router moves towards
    balance. 'auxiliary_loss': a loss over the global batch, as Qwen 3 was trained with; the model
    needs no bias and can be exported.
    """

    coefficient: Annotated[float, ABOVE_0] = 1e-3
    """
    For 'bias': the update per step. For 'auxiliary_loss': the weight of each layer's loss. The
    other methods do not use it.
    """


@dataclass
class Resilience:
    """What to do when a run meets trouble."""

    allow_config_mismatch: bool = False
    """
    Resume although the config contradicts the checkpoint (bag sizes, boundary, mode, sequence
    length, batch, tokenizer and the like).
    """

    skip_damaged: bool = False
    """
    Resume from the checkpoint before a damaged one, which is set aside as `damaged-N`, instead of
    stopping with an error.
    """

    max_skipped_steps: Annotated[int, at_least(0)] = 0
    """
    How many steps of a run may be left out of training because their loss or gradient norm is not
    finite. The next one stops the run.
    """


@dataclass
class JobConfig(UpstreamJobConfig):
    """Upstream's job config with the sections of this package."""

    superposition: Superposition = field(default_factory=Superposition)
    token_shards: TokenShards = field(default_factory=TokenShards)
    text_dataset: TextDataset = field(default_factory=TextDataset)
    lm_head: LMHead = field(default_factory=LMHead)
    load_balance: LoadBalance = field(default_factory=LoadBalance)
    resilience: Resilience = field(default_factory=Resilience)


def superposition_section(job_config: UpstreamJobConfig) -> Superposition:
    """The ``[superposition]`` section; of upstream's config, which has none, one that is off."""
    return getattr(job_config, SECTION, Superposition())


def token_shards_section(job_config: UpstreamJobConfig) -> TokenShards:
    """The ``[token_shards]`` section; of upstream's config, which has none, its defaults."""
    return getattr(job_config, TOKEN_SHARDS, TokenShards())


def text_dataset_section(job_config: UpstreamJobConfig) -> TextDataset:
    """The ``[text_dataset]`` section; of upstream's config, which has none, its defaults."""
    return getattr(job_config, TEXT_DATASET, TextDataset())


def lm_head_section(job_config: UpstreamJobConfig) -> LMHead:
    """The ``[lm_head]`` section; of upstream's config, which has none, its defaults."""
    return getattr(job_config, LM_HEAD, LMHead())


def load_balance_section(job_config: UpstreamJobConfig) -> LoadBalance:
    """The ``[load_balance]`` section; of upstream's config, which has none, its defaults."""
    return getattr(job_config, LOAD_BALANCE, LoadBalance())


def resilience_section(job_config: UpstreamJobConfig) -> Resilience:
    """The ``[resilience]`` section; of upstream's config, which has none, its defaults."""
    return getattr(job_config, RESILIENCE, Resilience())
