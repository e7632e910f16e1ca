"""Short runs of the example for the Hugging Face Trainer."""

from pathlib import Path

import numpy as np
from conformance_of_hf_trainer import L as LATENTS
from conformance_of_hf_trainer import S, V, arguments, example
from transformers import TrainerCallback

from torchtitan.experiments.tst.core import Schedule

BOUNDARY, STEPS = 2, 5
SCHEDULE = Schedule.of([S], [BOUNDARY])


class Gradients(TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


def tokens(count: int = 40_000) -> np.ndarray:
    return np.random.default_rng(0).integers(1, V, count).astype(np.uint16)


def run(
    folder: Path, model, stream, schedule=SCHEDULE, seq_len=LATENTS, collator=None, **options
) -> tuple[example.TSTTrainer, Gradients]:
    """Train a model by the example's classes."""
    resume = options.pop("resume", None)
    args = arguments(folder, **{"max_steps": STEPS} | options)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    gradients = Gradients()
    trainer = example.TSTTrainer(
        example.accept_bags(model),
        args,
        collator or example.Collator(seq_len),
        example.Windows(stream, seq_len, schedule, args.max_steps, per_step),
        callbacks=[example.SaveBoundary(schedule), gradients],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, gradients


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
