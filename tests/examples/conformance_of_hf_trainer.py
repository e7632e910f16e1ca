"""The example for the Hugging Face Trainer, as the conformance suite sees it."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Qwen3Config,
    Qwen3MoeConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from torchtitan.experiments.tst.core import BagLoss, Schedule
from torchtitan.experiments.tst.core.conformance import AfterStep

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
import hf_trainer as example

transformers.utils.logging.disable_progress_bar()  # of saved models

V, B, L, S = 64, 2, 16, 4
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
LLAMA = LlamaConfig(**SMALL)
QWEN3 = Qwen3Config(**SMALL, tie_word_embeddings=True)
QWEN3_MOE = Qwen3MoeConfig(
    **SMALL, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
)


def new_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model with the same weights each time."""
    set_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def arguments(folder: Path | str, **options: object) -> TrainingArguments:
    """Arguments of a run on CPU that logs each step, and reports nothing to anybody."""
    defaults = {
        "per_device_train_batch_size": B,
        "per_device_eval_batch_size": B,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 1},
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(folder), **defaults | options)


class ReadWindows(example.Windows):
    """Keeps what was read."""

    def __getitem__(self, n):
        self.__dict__.setdefault("read", []).append(window := super().__getitem__(n))
        return window


class ReportStep(TrainerCallback):
    """Tells the suite about each step."""

    def __init__(self, windows: ReadWindows, after_step: AfterStep):
        self.windows, self.after_step = windows, after_step

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:  # not of validation
            step = state.global_step
            tokens = torch.stack(self.windows.read[(step - 1) * B : step * B])
            self.after_step(tokens[:, :-1], tokens[:, 1:], logs["loss"])


class TST:
    """The example with a small Llama."""

    vocab_size, sequences, seq_len, bag_size = V, B, L, S
    weightings = ("uniform", "power_law")
    config: PretrainedConfig = LLAMA

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.model = example.accept_bags(new_model(self.config))
        self.trainer = self.new_trainer(example.TSTTrainer, self.model, example.Collator(L), 1)

    def new_trainer(self, trainer_class, model, collator, steps, **options) -> Trainer:
        args = arguments(self.folder.name, max_steps=steps, **options)
        trainer = trainer_class(model, args, collator)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def fold(self, inputs, labels, bag_size):
        windows = torch.cat([inputs, labels[:, -1:]], 1)
        batch = example.Collator(inputs.shape[1] // bag_size)(list(windows))
        return batch["input_ids"], batch["labels"]

    @torch.no_grad()
    def embed(self, inputs):
        return self.model.get_input_embeddings()(inputs)

    def logits(self, inputs):
        return self.model(inputs).logits

    def loss(self, logits, targets, weighting):
        trainer = self.trainer
        trainer.bag_loss = BagLoss(weighting=weighting)
        batch = {"input_ids": targets, "labels": targets}
        (batch,), counts = trainer.get_batch_samples(iter([batch]), 1, logits.device)
        return trainer.compute_loss(
            lambda input_ids: SimpleNamespace(logits=logits), batch, num_items_in_batch=counts
        )

    def validate(self, inputs, labels):
        windows = list(torch.cat([inputs, labels[:, -1:]], 1))
        return self.trainer.evaluate(windows)["eval_loss"]

    def train(self, tokens: torch.Tensor, bag_sizes: Sequence[int], after_step: AfterStep) -> None:
        stages = [size for size in bag_sizes if size > 1]
        schedule = Schedule.of(stages, [1] * len(stages))
        self.trainer = self.new_trainer(
            example.TSTTrainer, self.model, example.Collator(L), len(bag_sizes)
        )
        self.trainer.add_callback(example.SaveBoundary(schedule))
        windows = ReadWindows(tokens.numpy(), L, schedule, len(bag_sizes), B)
        self.run(self.trainer, windows, after_step)

    def train_ordinary(self, tokens: torch.Tensor, steps: int, after_step: AfterStep) -> None:
        def collate(windows):
            inputs, next_tokens = (torch.stack(windows)[:, i : L + i].contiguous() for i in (0, 1))
            return {"input_ids": inputs, "labels": inputs, "shift_labels": next_tokens}

        trainer = self.new_trainer(
            Trainer, new_model(self.config), collate, steps, train_sampling_strategy="sequential"
        )
        windows = ReadWindows(tokens.numpy(), L, Schedule(), steps, B)
        self.run(trainer, windows, after_step)

    def run(self, trainer: Trainer, windows: ReadWindows, after_step: AfterStep) -> None:
        trainer.train_dataset = windows
        trainer.add_callback(ReportStep(windows, after_step))
        trainer.train()


class TSTOfQwen3(TST):
    """The example with a small Qwen3, whose LM head is tied to the embedding."""

    config = QWEN3


class TSTOfQwen3Moe(TST):
    """The example with a small Qwen3 of experts."""

    config = QWEN3_MOE
