"""A job that both versions of TorchTitan train, as arguments of a command line."""

from pathlib import Path

MODELS = {"llama3": ("llama3", "demo"), "qwen3_moe": ("qwen3", "demo_moe")}
STEPS, BOUNDARY, S, L = 20, 10, 4, 32
SEQUENCES = 4  # of an ordinary step, on all ranks
ONLY_WEIGHTS = ("--checkpoint.enable", "--checkpoint.create_seed_checkpoint")


def args(corpus: Path, model: str, weights: Path | None = None, processes: int = 1) -> list[str]:
    """Arguments of a job on the corpus's token shards, in float32 and two phases.

    Args:
        corpus: folder of the corpus.
        model: a key of ``MODELS``.
        weights: first weights in Hugging Face's format; None for random ones.
        processes: that share the sequences of a step.
    """
    name, flavor = MODELS[model]
    load = (
        "--checkpoint.enable",
        "--checkpoint.load_only",
        f"--checkpoint.initial_load_path={weights}",
        "--checkpoint.initial_load_in_hf",
    )
    return [
        f"--model.name={name}",
        f"--model.flavor={flavor}",
        f"--model.hf_assets_path={corpus / 'tokenizer'}",
        "--training.dataset=token_shards",
        f"--training.dataset_path={corpus / 'tokens'}",
        f"--training.seq_len={L}",
        f"--training.local_batch_size={SEQUENCES // processes}",
        "--training.mixed_precision_param=float32",
        f"--training.steps={STEPS}",
        f"--superposition.bag_size={S}",
        f"--superposition.steps={BOUNDARY}",
        "--training.max_norm=0.5",  # some gradients are longer, and some are not
        "--optimizer.lr=4e-3",
        "--lr_scheduler.warmup_steps=2",
        "--activation_checkpoint.mode=none",
        "--metrics.log_freq=1",
        "--metrics.disable_color_printing",
        "--debug.seed=0",
        *(load if weights else ()),
    ]
