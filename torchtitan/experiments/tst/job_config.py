"""The ``[superposition]`` section of the job config, and its checks.

Everything here runs before a process group or a device is touched.
"""

import difflib
import importlib
import sys
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as UpstreamJobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from typing_extensions import override

from .core import Schedule

SECTION = "superposition"


class ConfigError(ValueError):
    """A job config that cannot run; the message names key, value and what is allowed."""


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


REINIT_MODULES = ("tok_embeddings", "output")


@dataclass
class JobConfig(UpstreamJobConfig):
    """Upstream's job config with the ``[superposition]`` section."""

    superposition: Superposition = field(default_factory=Superposition)


class SuperpositionConfigManager(ConfigManager):
    """Upstream's config manager (TOML, then command line) for :class:`JobConfig`."""

    def __init__(self) -> None:
        super().__init__(JobConfig)

    @override
    def parse_args(self, args: list[str] | None = None) -> JobConfig:
        return super().parse_args(sys.argv[1:] if args is None else args)

    @override
    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        toml = super()._maybe_load_toml(args)
        if toml:
            _check_toml_section(toml.get(SECTION, {}))
        return toml


def build_schedule(job_config: UpstreamJobConfig) -> Schedule:
    """The run's schedule; without a ``[superposition]`` section, one that is all recovery."""
    section: Superposition = getattr(job_config, SECTION, Superposition())
    if section.bag_size == 1:
        return Schedule()
    boundary = _boundary(section, job_config.training.steps)
    return Schedule(section.bag_size, boundary, section.mode, section.scale)


def _boundary(section: Superposition, total_steps: int) -> int:
    if section.steps is not None:
        return section.steps
    assert section.step_ratio is not None  # validate() has seen to it
    return Schedule.boundary_step(section.step_ratio, total_steps)


def validate(job_config: UpstreamJobConfig) -> None:
    """Check that the job can run, from config and files alone.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    if job_config.experimental.custom_import:  # may register models and datasets
        importlib.import_module(job_config.experimental.custom_import)
    section: Superposition = getattr(job_config, SECTION, Superposition())
    for f in fields(Superposition):
        _check_value(f, getattr(section, f.name))
    model_args = _model_args(job_config)
    if section.bag_size > 1:
        _check_steps(section, job_config.training.steps)
        _check_combinations(section)
        schedule = build_schedule(job_config)
        if schedule.enabled:
            _check_shapes(job_config, schedule)
            _check_attention(section, job_config.model.flavor, model_args)
            _check_parallelism(job_config)
    _check_dataset(job_config, "training")
    if job_config.validation.enable:
        _check_dataset(job_config, "validation")
    _check_tokenizer(job_config, model_args)


def _fail(key: str, value: object, allowed: str) -> None:
    raise ConfigError(f"{key} = {value!r}: {allowed}")


def _key(name: str) -> str:
    return f"{SECTION}.{name}"


def _check_toml_section(section: Any) -> None:
    """Unknown keys and wrong values of the TOML, which upstream reads unchecked."""
    if not isinstance(section, dict):
        _fail(SECTION, section, f"must be a section, [{SECTION}]")
    known = {f.name: f for f in fields(Superposition)}
    for name, value in section.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}? " if close else ""
            _fail(_key(name), value, f"unknown key; {hint}known keys are {', '.join(known)}")
        _check_value(known[name], value)


def _check_value(f: Field, value: Any) -> None:
    """Type, and for choices the value, against the field's annotation."""
    kind = get_type_hints(Superposition)[f.name]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            _fail(_key(f.name), value, f"must be one of {', '.join(get_args(kind))}")
        return
    types = get_args(kind) if NoneType in get_args(kind) else (get_origin(kind) or kind,)
    if float in types:
        types += (int,)
    if not isinstance(value, types) or isinstance(value, bool):
        names = {int: "an integer", float: "a number", list: "a list of strings"}
        _fail(_key(f.name), value, f"must be {next(names[t] for t in types if t in names)}")
    if f.name == "bag_size" and value < 1:
        _fail(
            _key(f.name), value, "must be an integer of at least 1 (1 switches superposition off)"
        )
    if f.name == "step_ratio" and value is not None and not 0 <= value < 1:
        _fail(_key(f.name), value, "must be in [0, 1)")
    if f.name == "steps" and value is not None and value < 0:
        _fail(_key(f.name), value, "must be an integer of at least 0")
    if f.name == "reinit_at_recovery":
        for module in value:
            if module not in REINIT_MODULES:
                _fail(_key(f.name), value, f"may hold {', '.join(REINIT_MODULES)}")


def _check_steps(section: Superposition, total_steps: int) -> None:
    ratio, steps = section.step_ratio, section.steps
    if ratio is not None and steps is not None:
        _fail(
            f"{_key('step_ratio')} = {ratio!r} and {_key('steps')}",
            steps,
            f"give one of the two (on the command line, --{_key('step_ratio')} None unsets one)",
        )
    if ratio is None and steps is None:
        _fail(
            _key("bag_size"),
            section.bag_size,
            f"needs {_key('step_ratio')} in [0, 1) or {_key('steps')} < training.steps",
        )
    boundary = _boundary(section, total_steps)
    if boundary >= total_steps:
        name = "steps" if steps is not None else "step_ratio"
        _fail(
            _key(name),
            getattr(section, name),
            f"{boundary} superposition steps must be fewer than training.steps = {total_steps}",
        )


def _check_combinations(section: Superposition) -> None:
    if section.loss != "mce" and section.weighting != "uniform":
        _fail(
            _key("weighting"),
            section.weighting,
            f'must be "uniform" with {_key("loss")} = {section.loss!r}: the bag is a set',
        )
    if section.mode == "output" and section.scale == "batch":
        _fail(
            _key("scale"),
            section.scale,
            f'must be "sequence" with {_key("mode")} = "output", which reads no extra data',
        )


def _check_shapes(job_config: UpstreamJobConfig, schedule: Schedule) -> None:
    training, validation = job_config.training, job_config.validation
    if training.seq_len < 1:
        _fail("training.seq_len", training.seq_len, "must be at least 1 token")
    try:
        shape = schedule.batch_shape(1, training.local_batch_size, training.seq_len)
    except ValueError as error:
        _fail(
            "training.seq_len",
            training.seq_len,
            f'{error}, {_key("bag_size")}, as {_key("scale")} = "batch" needs',
        )
    if schedule.mode == "output" and schedule.bag_size > training.seq_len:
        _fail(
            _key("bag_size"),
            schedule.bag_size,
            "the next s tokens do not fit into a sequence of "
            f"training.seq_len = {training.seq_len} tokens",
        )
    degree = job_config.parallelism.tensor_parallel_degree
    if shape.latents % degree:
        _fail(
            "training.seq_len",
            training.seq_len,
            f"gives {shape.latents} latents, which "
            f"parallelism.tensor_parallel_degree = {degree} does not divide",
        )
    if validation.enable and validation.seq_len > training.seq_len:
        _fail(
            "validation.seq_len",
            validation.seq_len,
            "must be at most training.seq_len = "
            f"{training.seq_len} tokens, the ordinary sequence length",
        )


def _check_attention(section: Superposition, flavor: str, model_args: Any) -> None:
    if section.mode == "output" or getattr(model_args, "attn_type", "sdpa") == "sdpa":
        return
    if model_args.attn_mask_type == "block_causal":
        _fail(
            "model.flavor",
            flavor,
            'has attn_mask_type = "block_causal", which finds documents '
            f"by token ids that bags do not have; with {_key('mode')} = {section.mode!r} choose a "
            'flavor with "causal"',
        )


def _check_parallelism(job_config: UpstreamJobConfig) -> None:
    for name in ("context_parallel_degree", "pipeline_parallel_degree"):
        if (degree := getattr(job_config.parallelism, name)) > 1:
            _fail(f"parallelism.{name}", degree, "must be 1 with superposition, for now")


def _model_args(job_config: UpstreamJobConfig) -> Any:
    name, flavor = job_config.model.name, job_config.model.flavor
    try:
        flavors = train_spec_module.get_train_spec(name).model_args
    except ValueError as error:
        raise ConfigError(f"model.name = {name!r}: {error}") from None
    if flavor not in flavors:
        _fail("model.flavor", flavor, f"{name} has {', '.join(flavors)}")
    return flavors[flavor]


def _check_dataset(job_config: UpstreamJobConfig, section: str) -> None:
    config = getattr(job_config, section)
    name, path = config.dataset.lower(), config.dataset_path
    if name not in DATASETS:
        _fail(f"{section}.dataset", config.dataset, f"must be one of {', '.join(DATASETS)}")
    if path is None:
        path = DATASETS[name].path
        if path.count("/") == 1:  # owner/name on the Hugging Face hub
            return
    if not path or not Path(path).exists():
        _fail(f"{section}.dataset_path", path, f"no such file or folder (dataset {name})")


def _check_tokenizer(job_config: UpstreamJobConfig, model_args: Any) -> None:
    path = job_config.model.hf_assets_path
    if not Path(path).exists():
        _fail("model.hf_assets_path", path, "no such folder (it holds the tokenizer)")
    spec = train_spec_module.get_train_spec(job_config.model.name)
    if spec.build_tokenizer_fn is None:
        return
    try:
        tokenizer = spec.build_tokenizer_fn(job_config)
    except FileNotFoundError as error:
        raise ConfigError(f"model.hf_assets_path = {path!r}: {error}") from None
    if tokenizer.get_vocab_size() > model_args.vocab_size:
        _fail(
            "model.hf_assets_path",
            path,
            f"its tokenizer has {tokenizer.get_vocab_size():,} "
            f"entries, more than the {model_args.vocab_size:,} of model.flavor = "
            f"{job_config.model.flavor!r}",
        )
