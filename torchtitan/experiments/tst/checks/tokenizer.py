"""Whether a job's tokenizer opens, and fits its model."""

import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig

from ..data.tokenizer import tokenizer_builder
from ..data.tokenizer_identity import entries
from ..errors import ConfigError
from .model import model_args_of


def check_tokenizer(job_config: JobConfig) -> BaseTokenizer | None:
    """Check the tokenizer.

    Returns:
        The tokenizer; None for a model that has none.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    path, model_args = job_config.model.hf_assets_path, model_args_of(job_config)
    spec = train_spec_module.get_train_spec(job_config.model.name)
    build = tokenizer_builder(spec.build_tokenizer_fn)
    if build is None:
        return None
    try:
        tokenizer = build(job_config)
    except FileNotFoundError as error:
        raise ConfigError("model.hf_assets_path", path, str(error)) from None
    if (count := entries(tokenizer)) > model_args.vocab_size:
        raise ConfigError(
            "model.hf_assets_path",
            path,
            f"its tokenizer has {count:,} "
            f"entries, more than the {model_args.vocab_size:,} of model.flavor = "
            f"{job_config.model.flavor!r}",
        )
    _check_documents_end(job_config, tokenizer)
    return tokenizer


def _check_documents_end(job_config: JobConfig, tokenizer: BaseTokenizer) -> None:
    """Attention within documents finds them by their EOS token."""
    model_args = model_args_of(job_config)
    masks = getattr(model_args, "attn_type", "sdpa") in ("flex", "varlen")  # as upstream's trainer
    within = masks and getattr(model_args, "attn_mask_type", "causal") == "block_causal"
    if within and getattr(tokenizer, "eos_id", None) is None:
        raise ConfigError(
            "model.flavor",
            job_config.model.flavor,
            f'its attention ({model_args.attn_type}, attn_mask_type = "block_causal") finds the '
            "ends of documents by the EOS token, and the tokenizer in model.hf_assets_path = "
            f"{job_config.model.hf_assets_path!r} has none; set eos_token in its "
            "tokenizer_config.json, or take a flavor without such attention",
        )
