"""Generate text with a model, using transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ArgumentError
from .export import exported


def sample(
    model: Path,
    job_arguments: list[str],
    *,
    prompt: str,
    samples: int,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> list[str]:
    """Return texts that begin with a prompt, up to the sequence length of training.

    Args:
        model: a checkpoint, a run folder or an exported folder.
        job_arguments: arguments of a checkpoint's job, which override the run's config.
        prompt: the prompt; the token that begins a document is added before it.
        samples: number of texts.
        tokens: maximum number of new tokens in each text.
        temperature: sampling temperature; 0 always takes the likeliest token.
        top_k: number of likeliest tokens to sample from; 0 for all tokens.
        seed: random seed.

    Raises:
        ArgumentError: for a number below its minimum, or a prompt that does not fit.
        CheckpointError: for a checkpoint that cannot be read.
        ExportError: for a checkpoint that cannot be exported.
    """
    numbers = {"samples": samples, "tokens": tokens, "temperature": temperature, "top-k": top_k}
    for name, least in (("samples", 1), ("tokens", 1), ("temperature", 0), ("top-k", 0)):
        if numbers[name] < least:
            raise ArgumentError(f"--{name} {numbers[name]}: must be at least {least}")
    if not 0 <= seed < 2**32:
        raise ArgumentError(f"--seed {seed}: must be in [0, 2**32)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with exported(model, job_arguments) as folder:
        return _sample(folder, prompt, samples, tokens, temperature, top_k, seed)


def _sample(
    folder: Path, prompt: str, samples: int, tokens: int, temperature: float, top_k: int, seed: int
) -> list[str]:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ValueError as error:  # for example a model that transformers does not know
        raise ArgumentError(f"{folder}: {error}") from error
    model = model.to(device)
    ids = tokenizer(prompt).input_ids
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ArgumentError(
            "--prompt is empty, and this tokenizer has no BOS token to begin with: give a prompt"
        )
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise ArgumentError(
            f"--prompt has {len(ids)} tokens: must have fewer than the model's sequence length, "
            f"{model.config.max_position_embeddings}"
        )
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": top_k}
    transformers.set_seed(seed)
    inputs = torch.tensor([ids] * samples, device=device)
    outputs = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(tokens, room),
        pad_token_id=tokenizer.eos_token_id,
        **options,
    )
    return tokenizer.batch_decode(outputs, skip_special_tokens=True)
