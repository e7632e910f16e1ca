"""This package's sections of the job config, ``[superposition]`` and those beside it.

What a value may be by itself is in :mod:`.config`; what must fit together, in ``job_checks``.
"""

import argparse
import functools
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli
from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as UpstreamJobConfig
from typing_extensions import override
from tyro.constructors import ConstructorRegistry

from .config.command_line import refused_in_one_line
from .config.errors import ConfigError
from .config.values import check_toml
from .core import Schedule

CONFIG_FILE = "config.toml"  # in the run folder: the resolved config
SECTION, TOKEN_SHARDS = "superposition", "token_shards"
TEXT_DATASET, LM_HEAD, RESILIENCE = "text_dataset", "lm_head", "resilience"


@dataclass
class Superposition:
    """Token Superposition Training (arXiv 2605.06546)."""

    bag_size: int = 1
    """s, the number of contiguous data tokens in a bag. 1 switches superposition off."""

    step_ratio: float | None = None
    """r, the share of training.steps in superposition, in [0, 1). Give this or `steps`."""

    steps: int | None = None
    """The number of steps in superposition, less than training.steps. Give this or `step_ratio`."""

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

    reinit_at_recovery: list[str] = field(default_factory=list)
    """
    Modules to initialise afresh, with their optimizer state, before the first recovery step, an
    ablation that costs most of the gain: 'tok_embeddings', 'output'. Empty to keep all weights.
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

    weights: list[float] = field(default_factory=list)
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

    chunks: int = 1
    """
    Into how many chunks to cut the positions of a micro-batch, so that the logits of one chunk at a
    time are in memory: about so many times less memory for them, in the same time. 1 is
    upstream's way, bit for bit; with a vocabulary of 100,000 and more, 8 is a good value.
    """


@dataclass
class Resilience:
    """What to do when a run meets trouble."""

    allow_config_mismatch: bool = False
    """
    Resume although the config contradicts the checkpoint (bag size, boundary, mode, sequence
    length, batch, tokenizer and the like).
    """

    skip_damaged: bool = False
    """
    Resume from the checkpoint before a damaged one, which is set aside as `damaged-N`, instead of
    stopping with an error.
    """

    max_skipped_steps: int = 0
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
    resilience: Resilience = field(default_factory=Resilience)


class SuperpositionConfigManager(ConfigManager):
    """Upstream's config manager (TOML, then command line) for :class:`JobConfig`.

    Raises:
        ConfigError: from :meth:`parse_args`, for a file or a command line that cannot be read, an
            unknown key, or a value that is not of its key's type, choices and range.
    """

    def __init__(self) -> None:
        super().__init__(JobConfig)
        self._extended_cls: type[UpstreamJobConfig] = JobConfig

    @override
    @staticmethod
    @functools.cache
    def register_tyro_rules(registry: ConstructorRegistry) -> None:
        """Once for all managers: each registration slows down all later parsing."""
        ConfigManager.register_tyro_rules(registry)

    @override
    def parse_args(self, args: list[str] | None = None) -> JobConfig:
        args = sys.argv[1:] if args is None else args
        with refused_in_one_line(args, lambda: self._extended_cls):
            return super().parse_args(args)

    @override
    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        path = _option("config_file", args)
        return None if path is None else read_toml(path)

    @override
    def _maybe_add_custom_config(
        self, args: list[str], toml_values: dict[str, Any] | None
    ) -> type[UpstreamJobConfig]:
        try:
            self._extended_cls = super()._maybe_add_custom_config(args, toml_values)
        except (ImportError, AttributeError) as error:
            key, of_toml = "custom_config_module", (toml_values or {}).get("job", {})
            name = _option(key, args) or of_toml[key]
            raise ConfigError(f"job.{key}", name, f"cannot be imported: {error}") from error
        check_toml(self._extended_cls, toml_values or {})
        return self._extended_cls

    @override
    def _validate_config(self) -> None:
        model = self.config.model
        path = model.tokenizer_path or model.hf_assets_path
        if path.endswith("tokenizer.model") and Path(path).is_file():
            # where upstream's own check raises a bare Exception
            raise ConfigError(
                "model.hf_assets_path",
                path,
                "is a file, and must be a folder with tokenizer.json. Convert the tokenizer with "
                "transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER), or "
                "fetch one with `tst assets`",
            )
        super()._validate_config()


def read_toml(path: str) -> dict[str, Any]:
    """The content of a job's TOML.

    Raises:
        ConfigError: naming the file, and the line that is not TOML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return tomli.loads(text)
    except OSError as error:
        raise ConfigError("job.config_file", path, f"{error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError("job.config_file", path, f"is not UTF-8: {error}") from None
    except tomli.TOMLDecodeError as error:
        end = f"at the end, line {len(text.splitlines())}"
        why = str(error).replace("at end of document", end)
        raise ConfigError("job.config_file", path, f"is not TOML: {why}") from None


def _option(key: str, args: list[str]) -> str | None:
    """A key of ``[job]`` on the command line, which is needed before that is parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = (f"--job.{key}", f"--job.{key.replace('_', '-')}")
    parser.add_argument(*names, dest="given", nargs="?", action="append", default=[])
    return next(iter(parser.parse_known_args(args)[0].given), None)  # the first, as upstream


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


def resilience_section(job_config: UpstreamJobConfig) -> Resilience:
    """The ``[resilience]`` section; of upstream's config, which has none, its defaults."""
    return getattr(job_config, RESILIENCE, Resilience())


def ranks_of_layout(job_config: UpstreamJobConfig) -> tuple[int, bool]:
    """Ranks that the degrees of ``[parallelism]`` make, and whether it is any multiple of them.

    It is with ``data_parallel_shard_degree = -1``, which takes as many as there are, if experts are
    shared by whole groups of them.
    """
    layout = job_config.parallelism
    ranks = _ranks_of_model(job_config) * layout.data_parallel_replicate_degree
    if layout.data_parallel_shard_degree != -1:
        return ranks * layout.data_parallel_shard_degree, False
    # the shards of other parameters and the ranks of experts are the same ranks
    of_experts = layout.expert_parallel_degree * layout.expert_tensor_parallel_degree
    shards = layout.context_parallel_degree * layout.tensor_parallel_degree
    return ranks * (math.lcm(of_experts, shards) // shards), True


def dp_degree(job_config: UpstreamJobConfig, ranks: int) -> int:
    """Data-parallel ranks of ``ranks`` processes."""
    return max(1, ranks // _ranks_of_model(job_config))


def _ranks_of_model(job_config: UpstreamJobConfig) -> int:
    """Ranks that read the same data."""
    layout = job_config.parallelism
    return (
        layout.context_parallel_degree
        * layout.tensor_parallel_degree
        * layout.pipeline_parallel_degree
    )


def global_batch_size(job_config: UpstreamJobConfig, dp_degree: int) -> int:
    """Sequences in an ordinary step on ``dp_degree`` data-parallel ranks."""
    training = job_config.training
    if training.global_batch_size < 0:
        return training.local_batch_size * dp_degree
    return training.global_batch_size


def compiles(job_config: UpstreamJobConfig, component: Literal["model", "loss"]) -> bool:
    """Whether torch.compile is to compile a component."""
    return job_config.compile.enable and component in job_config.compile.components


def build_schedule(job_config: UpstreamJobConfig) -> Schedule:
    """The run's schedule; with superposition off, one that is all recovery."""
    section = superposition_section(job_config)
    if section.bag_size == 1:
        return Schedule()
    boundary = boundary_step(section, job_config.training.steps)
    return Schedule(section.bag_size, boundary, section.mode, section.scale)


def boundary_step(section: Superposition, total_steps: int) -> int:
    """K, the last superposition step; a ratio gives the nearest whole step."""
    if section.steps is not None:
        return section.steps
    assert section.step_ratio is not None  # check_job() has seen to it
    return round(section.step_ratio * total_steps)
