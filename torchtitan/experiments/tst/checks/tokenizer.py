"""Check that a job's tokenizer opens, and fits its model."""

import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig

from ..data.tokenizer import tokenizer_builder
from ..data.tokenizer_identity import entries
from ..errors import ConfigError
from .model import model_args_of


def check_tokenizer(job_config: JobConfig) -> BaseTokenizer | None:
    """Open the tokenizer and check that it fits the model.

    Returns:
        The tokenizer; None for a model without one.

    Raises:
        ConfigError: if it cannot be opened or does not fit.
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
    if not hasattr(model_args, "vocab_size"):
        raise ConfigError(
            "model.flavor",
            job_config.model.flavor,
            "its model args have no vocab_size, the number of entries of tok_embeddings",
        )
    if (count := entries(tokenizer)) > model_args.vocab_size:
        raise ConfigError(
            "model.hf_assets_path",
            path,
            f"its tokenizer has {count:,} entries, more than the {model_args.vocab_size:,} of "
            f"model.flavor = {job_config.model.flavor!r}; use the model's own tokenizer",
        )
    _check_documents_end(job_config, tokenizer)
    return tokenizer


def _check_documents_end(job_config: JobConfig, tokenizer: BaseTokenizer) -> None:
    """Check that there is an EOS token if attention needs it to tell documents apart."""
    model_args = model_args_of(job_config)
    masks = getattr(model_args, "attn_type", "sdpa") in ("flex", "varlen")  # as in upstream
    within = masks and getattr(model_args, "attn_mask_type", "causal") == "block_causal"
    if within and getattr(tokenizer, "eos_id", None) is None:
        raise ConfigError(
            "model.flavor",
            job_config.model.flavor,
            f'its attention ({model_args.attn_type}, attn_mask_type = "block_causal") finds the '
            "ends of documents by the EOS token, but the tokenizer in model.hf_assets_path = "
            f"{job_config.model.hf_assets_path!r} has none; set eos_token in its "
            "tokenizer_config.json, or use a flavor without document masks",
        )
