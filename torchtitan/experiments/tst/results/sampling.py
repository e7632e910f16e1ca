"""What a model writes, with transformers."""

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
    """Return continuations of a prompt, with it, up to the sequence length of training.

    Args:
        model: checkpoint, run folder or exported folder.
        job_arguments: of the job of a checkpoint, over the run's config.
        prompt: after the token that begins a document.
        samples: how many.
        tokens: at most so many new ones in each.
        temperature: 0 always takes the likeliest token.
        top_k: among so many of the likeliest; 0 for all.
        seed: of the draws.

    Raises:
        ArgumentError: for a number below its least, or a prompt that does not fit.
        CheckpointError: for a checkpoint that cannot be exported.
        ExportError: likewise.
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
    except ValueError as error:  # such as of a model that transformers does not know
        raise ArgumentError(f"{folder}: {error}") from error
    model = model.to(device)
    ids = tokenizer(prompt).input_ids
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ArgumentError(
            "--prompt: this tokenizer has no token that begins a document; give one"
        )
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise ArgumentError(
            f"--prompt is {len(ids)} tokens; the model was trained on sequences of "
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
