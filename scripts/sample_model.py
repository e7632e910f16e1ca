"""A quick look at what a model writes, from a checkpoint or an exported folder.

    python scripts/sample_model.py outputs/demo/tst --prompt "def main("

Needs the extra "eval". Further arguments are the job's, as in scripts/export_model.py.
"""

import sys
from pathlib import Path

from command_line import documented_parser
from export_model import exported
from torchtitan.experiments.tst.checkpoint.files import CheckpointError
from torchtitan.experiments.tst.export import ExportError


def sample(
    folder: Path, prompt: str, samples: int, tokens: int, temperature: float, top_k: int, seed: int
) -> list[str]:
    """Continuations of ``prompt``, with it, up to the sequence length of training.

    Args:
        folder: an exported one.
        prompt: after the token that begins a document.
        samples: how many.
        tokens: at most so many new ones in each.
        temperature: 0 always takes the likeliest token.
        top_k: among so many of the likeliest; 0 for all.
        seed: of the draws.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt).input_ids
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError("--prompt: this tokenizer has no token that begins a document; give one")
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise ValueError(
            f"--prompt is {len(ids)} tokens; the model was trained on sequences of "
            f"{model.config.max_position_embeddings}"
        )
    options = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": top_k}
    set_seed(seed)
    inputs = torch.tensor([ids] * samples, device=device)
    outputs = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(tokens, room),
        pad_token_id=tokenizer.eos_token_id,
        **options,
    )
    return tokenizer.batch_decode(outputs, skip_special_tokens=True)


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("model", type=Path, help="checkpoint, run folder or exported folder")
    parser.add_argument("--prompt", default="", help="default: only the beginning of a document")
    parser.add_argument("--samples", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=128, help="new ones; default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest; default: %(default)s"
    )
    parser.add_argument("--top-k", type=int, default=0, help="of the likeliest; default: all")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args, job_args = parser.parse_known_args()
    for name, least in (("samples", 1), ("tokens", 1), ("temperature", 0), ("top_k", 0)):
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            parser.error(f"--{option} {getattr(args, name)}: must be at least {least}")
    try:
        import transformers
    except ImportError:
        sys.exit('error: transformers is missing: pip install -e ".[eval]"')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with exported(args.model, job_args) as folder:
            texts = sample(
                folder,
                args.prompt,
                args.samples,
                args.tokens,
                args.temperature,
                args.top_k,
                args.seed,
            )
    except (CheckpointError, ExportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for number, text in enumerate(texts, start=1):
        print(f"--- {number}\n{text}")


if __name__ == "__main__":
    main()
