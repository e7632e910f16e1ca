"""Pre-train a Hugging Face model by Token Superposition Training (TST) with transformers.Trainer.

It reads token ids from .npy files, and takes the usual arguments of TrainingArguments::

    python docs/examples/hf_trainer.py --model_config FOLDER --train_tokens train.npy \
        --eval_tokens eval.npy --seq_len 1024 --bag_size 6 --step_ratio 0.3 --max_steps 20000 \
        --per_device_train_batch_size 8 --learning_rate 3e-4 --warmup_steps 500 \
        --lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs '{"num_decay_steps": 4000}' \
        --eval_strategy steps --eval_steps 500 --output_dir out

FOLDER has the config.json of a Llama or Qwen3 model. Use torchrun for several GPUs,
``--resume_from_checkpoint out/checkpoint-500`` to resume, and ``--step_ratio 0`` for the baseline.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils import data
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

# or from your copy: tst core copy FOLDER
from torchtitan.experiments.tst.core import BagEmbedding, BagLoss, Schedule, fold


@dataclass
class Windows(data.Dataset):
    """The windows of a run, in order: s*L + 1 tokens each, the last one as a target only.

    The place of window n in the data follows from n alone. So the Trainer resumes exactly in either
    phase by its own skipping, which reads no data.

    Attributes:
        tokens: token ids (N,), in memory or mapped from a file.
        seq_len: L, tokens of a window in recovery, and bags of one in superposition.
        schedule: the bag size s of each step; 1 in recovery.
        steps: steps of the run.
        per_step: windows of a step, over all micro-batches and ranks.
    """

    tokens: np.ndarray
    seq_len: int
    schedule: Schedule
    steps: int
    per_step: int

    def __post_init__(self):
        """Check that the data is long enough."""
        if len(self) and (needed := self.place(len(self) - 1)[1]) > len(self.tokens):
            raise ValueError(f"the run reads {needed:,} tokens; the data has {len(self.tokens):,}")

    def __len__(self) -> int:
        return self.steps * self.per_step

    def place(self, n: int) -> tuple[int, int]:
        """Return where window n begins and ends in the data."""
        step = n // self.per_step + 1
        begin = sum(
            stage.steps * self.per_step * (stage.bag_size * self.seq_len + 1)
            for stage in self.schedule.until(step - 1)
        )
        length = self.schedule.bag_size_at(step) * self.seq_len + 1
        begin += n % self.per_step * length
        return begin, begin + length

    def __getitem__(self, n: int) -> torch.Tensor:
        begin, end = self.place(n)
        return torch.from_numpy(self.tokens[begin:end].astype(np.int64))


@dataclass
class Collator:
    """Stack windows into a batch: bags and targets in superposition, tokens in recovery."""

    seq_len: int

    def __call__(self, windows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for windows (s*L + 1,)."""
        tokens = torch.stack(windows)  # (B, s*L + 1)
        inputs, next_tokens = tokens[:, :-1], tokens[:, 1:]  # (B, s*L)
        bag_size = inputs.shape[1] // self.seq_len
        if bag_size > 1:
            bags, targets = fold(inputs, next_tokens, bag_size)  # (B, L, s)
            return {"input_ids": bags, "labels": targets}
        # From labels alone, the model would have no target for the last token.
        return {"input_ids": inputs, "labels": inputs, "shift_labels": next_tokens.contiguous()}


def accept_bags(model: PreTrainedModel) -> PreTrainedModel:
    """Let the model read bags. Its weights stay the same, and tied weights stay tied."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding:  # Gemma's, for example, scales
        raise TypeError(f"the embedding is a {type(embedding)}, it must be a torch.nn.Embedding")
    model.set_input_embeddings(BagEmbedding.from_embedding(embedding))
    return model


UNSUITABLE = {  # arguments of TrainingArguments that TSTTrainer refuses, and why
    "label_smoothing_factor": "it would smooth recovery only, and lose the last target of a window",
    "auto_find_batch_size": "the number of windows of a step must not change",
    "save_only_model": "a run could not resume from the boundary",
    "ignore_data_skip": "a resumed run would read the first windows again, in superposition",
}


def windows_per_step(args: TrainingArguments) -> int:
    """Return the number of windows of a step, over all micro-batches and ranks."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


class TSTTrainer(Trainer):
    """A Trainer for both phases. In recovery and for evaluation, it is the ordinary Trainer."""

    bag_loss = BagLoss()

    def train(self, *args, **kwargs):
        """Train, unless an argument would silently train something else."""
        for name, reason in UNSUITABLE.items():
            if getattr(self.args, name):
                raise ValueError(f"{name} does not work with TST: {reason}. Remove it")
        windows, per_step = self.train_dataset, windows_per_step(self.args)
        if (windows.steps, windows.per_step) != (self.args.max_steps, per_step):
            raise ValueError(
                f"Windows has steps = {windows.steps} and per_step = {windows.per_step}; by the "
                f"arguments it must have max_steps = {self.args.max_steps} and {per_step}"
            )
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        """Read the windows in order. The default is random, and would mix the phases."""
        return data.SequentialSampler(self.train_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, and the number of their targets on all ranks."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and batches[0]["labels"].ndim == 3:  # superposition
            counts = sum(self.bag_loss.counts(batch["labels"]) for batch in batches)
            count = self.accelerator.reduce(counts.to(device), "sum")  # (s,), one for each offset
        return batches, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the part of a micro-batch in the mean over the step."""
        superposition = inputs["labels"].ndim == 3
        self.loss_is_scaled_for_ga = superposition or None  # None: as the Trainer finds out
        if not superposition:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(input_ids=inputs["input_ids"])
        coefficients = self.bag_loss.coefficients(num_items_in_batch)
        loss = self.bag_loss.sum(outputs.logits, inputs["labels"], coefficients)
        if getattr(outputs, "aux_loss", None) is not None:  # the experts' load, as in recovery
            loss = loss + self.model.config.router_aux_loss_coef * outputs.aux_loss
        loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, outputs) if return_outputs else loss


@dataclass
class SaveBoundary(TrainerCallback):
    """Save a full checkpoint after the last superposition step, and keep it as boundary-K.

    ``save_total_limit`` deletes checkpoint-K in time. The folder boundary-K has hard links to the
    same files and stays. You can resume from it.
    """

    schedule: Schedule

    def on_step_end(self, args, state, control, **kwargs):
        """Have the boundary saved."""
        control.should_save |= state.global_step == self.schedule.boundary

    def on_save(self, args, state, control, **kwargs):
        """Link the files of the boundary."""
        if state.global_step == self.schedule.boundary:
            args.distributed_state.wait_for_everyone()  # each rank writes files
            if args.should_save:
                saved = Path(args.output_dir, f"checkpoint-{state.global_step}")
                kept = saved.with_name(f"boundary-{state.global_step}")
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(saved, kept, copy_function=os.link)


@dataclass
class Job:
    """The command-line arguments next to those of TrainingArguments."""

    model_config: str = field(metadata={"help": "folder with the model's config.json"})
    train_tokens: str = field(metadata={"help": "token ids for training, a .npy file"})
    eval_tokens: str = field(metadata={"help": "token ids for evaluation, a .npy file"})
    seq_len: int = field(metadata={"help": "L: tokens of a sequence, or bags in superposition"})
    bag_size: int = field(default=6, metadata={"help": "s: tokens of a bag"})
    step_ratio: float = field(default=0.3, metadata={"help": "r: share of superposition steps"})


def main() -> None:
    """Train a model from the command line."""
    job, args = HfArgumentParser((Job, TrainingArguments)).parse_args_into_dataclasses()
    if args.max_steps < 1:
        raise ValueError("give --max_steps: the boundary is a share of it")
    schedule = Schedule.of([job.bag_size], [round(job.step_ratio * args.max_steps)])
    tokens, held_out = np.load(job.train_tokens, "r"), np.load(job.eval_tokens, "r")
    set_seed(args.seed)  # the Trainer does so only after the model has its weights
    config = AutoConfig.from_pretrained(job.model_config)
    trainer = TSTTrainer(
        accept_bags(AutoModelForCausalLM.from_config(config, dtype=torch.float32)),
        args,
        Collator(job.seq_len),
        Windows(tokens, job.seq_len, schedule, args.max_steps, windows_per_step(args)),
        Windows(held_out, job.seq_len, Schedule(), len(held_out) // (job.seq_len + 1), 1),
        callbacks=[SaveBoundary(schedule)],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
