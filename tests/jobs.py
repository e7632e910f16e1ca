"""The small jobs that tests train, and what runs leave."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from torchtitan.experiments.tst.metrics_file import TRAINING_LOSS
from torchtitan.experiments.tst.testing.states import read_state
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

ROOT = Path(__file__).parent.parent
TST = "torchtitan.experiments.tst.train"
UPSTREAM = "torchtitan.train"

B, L = 4, 32  # sequences and latents of a step
S, BOUNDARY, STEPS = 4, 3, 6


def superposition(bag_size: int | str = S, steps: int | str = BOUNDARY) -> tuple[str, ...]:
    """Arguments of a job that begins with bags; of several sizes, such as "4,2"."""
    return (f"--superposition.bag_size={bag_size}", f"--superposition.steps={steps}")


def saving(interval: int) -> tuple[str, ...]:
    """Arguments of a job that keeps full checkpoints, of every so many steps and of the last."""
    return (
        "--checkpoint.enable",
        f"--checkpoint.interval={interval}",
        "--checkpoint.keep_latest_k=0",
        "--checkpoint.no-last-save-model-only",
    )


ON = superposition()
IN_STAGES = superposition("4,2,3", "1,2,1")  # and two steps of recovery
SAVE = saving(1)
SAVE_LAST = saving(100)  # and the boundary, as always


def small_job(corpus: Path) -> list[str]:
    """A deterministic job on the corpus, without a [superposition] section."""
    return [
        "--model.flavor=demo",
        f"--model.hf_assets_path={corpus / 'tokenizer'}",
        "--training.dataset=jsonl",
        f"--training.dataset_path={corpus / 'train.jsonl'}",
        f"--training.seq_len={L}",
        f"--training.local_batch_size={B}",
        "--training.mixed_precision_param=float32",
        f"--training.steps={STEPS}",
        "--lr_scheduler.warmup_steps=2",
        "--activation_checkpoint.mode=none",
        "--metrics.log_freq=1",
        "--metrics.disable_color_printing",
        "--debug.seed=0",
    ]


def validation(corpus: Path) -> tuple[str, ...]:
    """Arguments of a job that validates on the corpus, two batches each time."""
    return (
        "--validation.enable",
        "--validation.dataset=jsonl",
        "--validation.steps=2",
        f"--validation.dataset_path={corpus / 'validation.jsonl'}",
        f"--validation.seq_len={L}",
        f"--validation.local_batch_size={B}",
    )


class Run(NamedTuple):
    """A run that has ended: the lines of metrics.jsonl, and its folder."""

    lines: list[dict[str, Any]]
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def losses(self) -> dict[int, float]:
        return losses(self.lines)


def losses(lines: list[dict[str, Any]]) -> dict[int, float]:
    """The training loss of each step."""
    return {line["step"]: line[TRAINING_LOSS] for line in lines if TRAINING_LOSS in line}


def column(lines: list[dict[str, Any]], key: str = TRAINING_LOSS) -> list[Any]:
    """The values of a key, of the lines that have it."""
    return [line[key] for line in lines if key in line]


class RecordingTrainer(SuperpositionTrainer):
    """Keeps every micro-batch as it was read: (inputs, labels)."""

    def batch_generator(self, data_iterable):
        self.read = []
        for input_dict, labels in super().batch_generator(data_iterable):
            self.read.append((input_dict["input"], labels))
            yield input_dict, labels


def poisoned_at(*steps, what="loss"):
    """A trainer whose loss, or gradient, of these steps is not a number."""

    class Trainer(SuperpositionTrainer):
        def forward_backward_step(self, **kwargs):
            model = self.model_parts[0]
            poisoned = self.step in steps and what == "loss"
            hook = model.register_forward_hook(
                lambda model, inputs, logits: logits * torch.nan if poisoned else logits
            )
            loss = super().forward_backward_step(**kwargs)
            hook.remove()
            if self.step in steps and what == "gradient":
                next(model.parameters()).grad.view(-1)[0] = torch.inf
            return loss

    return Trainer


def tensorboard_scalars(run_folder: Path) -> dict[str, list[float]]:
    """Every step's value of each tag, in float32 as they were logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run_folder / "tb").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [s.value for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def load_full(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint by name."""
    state = read_state(checkpoint)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
