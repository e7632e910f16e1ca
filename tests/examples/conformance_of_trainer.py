"""This trainer, with TorchTitan's Llama 3, as the conformance suite sees it.

    tst conformance tests/examples/conformance_of_trainer.py

It trains by the real ``SuperpositionTrainer`` on token shards, and without TST by TorchTitan's own
``Trainer``. All runs are in this process, in float32.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.train import Trainer

from torchtitan.experiments.tst import models
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.core import IGNORE_INDEX, fold
from torchtitan.experiments.tst.testing.ranks import free_port
from torchtitan.experiments.tst.training.phase_loss import Targets
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer
from torchtitan.experiments.tst.upstream.cpu import enable_cpu_if_alone
from torchtitan.experiments.tst.upstream.names import train_spec_as

B, L, S = 2, 16, 4
AfterStep = Callable[[torch.Tensor, torch.Tensor, float], None]
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]

enable_cpu_if_alone()
models.register()


class Reporting:
    """Reports the tokens and the loss of each step. It goes before the class of a trainer."""

    after_step: AfterStep

    def batch_generator(self, data_iterable: Any) -> Iterator[Batch]:
        for input_dict, labels in super().batch_generator(data_iterable):  # type: ignore[misc]
            self.batch = input_dict["input"], labels
            yield input_dict, labels

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        loss = super().forward_backward_step(**kwargs)  # type: ignore[misc]
        self.loss = loss.item()
        return loss

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        super().train_step(data_iterator)  # type: ignore[misc]
        self.after_step(*self.batch, self.loss)


class ThisTrainer(Reporting, SuperpositionTrainer):
    """The trainer of this package."""


class TorchTitansTrainer(Reporting, Trainer):
    """TorchTitan's own trainer, which nothing of this package changes."""


class Windows(BaseDataLoader):
    """A plain loader for TorchTitan's trainer: windows of L + 1 tokens, in their order."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __iter__(self) -> Iterator[Batch]:
        for windows in self.tokens.unfold(0, L + 1, L + 1).split(B):  # (B, L + 1)
            yield {"input": windows[:, :-1].contiguous()}, windows[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class OneBatch(list):
    """A loader of a single batch, for the validator."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class TST:
    """The trainer with a small model."""

    vocab_size, sequences, seq_len, bag_size = 1024, B, L, S
    weightings = ("uniform", "power_law")
    model = "llama3"
    arguments: tuple[str, ...] = ("--model.name=llama3", "--model.flavor=demo")

    def __init__(self) -> None:
        with self._trainer(torch.zeros(1000, dtype=torch.int64), [S, 1]) as trainer:
            self.trainer: Any = trainer

    def fold(
        self, inputs: torch.Tensor, labels: torch.Tensor, bag_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fold(inputs, labels, bag_size)

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.trainer.model_parts[0].tok_embeddings(inputs)

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.trainer.model_parts[0](inputs)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, weighting: str) -> torch.Tensor:
        loss_fn = self.trainer.loss_fn
        loss_fn.bag_loss = dataclasses.replace(loss_fn.bag_loss, weighting=weighting)
        loss_fn._sum = loss_fn.bag_loss.sum
        loss_fn.expect(Targets(targets, self.trainer._loss_coefficients([targets])))
        return loss_fn(logits, targets) / (targets != IGNORE_INDEX).sum()

    def validate(self, inputs: torch.Tensor, labels: torch.Tensor) -> float:
        validator, losses = self.trainer.validator, list[float]()
        validator.validation_dataloader = OneBatch([({"input": inputs}, labels)])
        processor = self.trainer.metrics_processor
        with mock.patch.object(
            processor, "log_validation", lambda loss, **kwargs: losses.append(loss)
        ):
            validator.validate(self.trainer.model_parts, step=1)
        return losses[0]

    def train(self, tokens: torch.Tensor, bag_sizes: Sequence[int], after_step: AfterStep) -> None:
        with self._trainer(tokens, bag_sizes) as self.trainer:
            self.trainer.after_step = after_step
            self.trainer.train()

    def train_ordinary(self, tokens: torch.Tensor, steps: int, after_step: AfterStep) -> None:
        spec = dataclasses.replace(
            get_train_spec(self.model),
            build_tokenizer_fn=None,
            build_dataloader_fn=lambda **kwargs: Windows(tokens),
        )
        with run_folder() as folder, train_spec_as(self.model, spec):
            config = ConfigManager().parse_args([*self._job(folder), f"--training.steps={steps}"])
            trainer = TorchTitansTrainer(config)
            trainer.after_step = after_step
            trainer.train()
            trainer.close()

    def _job(self, folder: Path) -> list[str]:
        return [
            *self.arguments,
            f"--job.dump_folder={folder}",
            f"--training.local_batch_size={B}",
            f"--training.seq_len={L}",
            "--training.mixed_precision_param=float32",
            "--activation_checkpoint.mode=none",
            "--lr_scheduler.warmup_steps=2",
            "--optimizer.lr=1e-2",
            "--metrics.log_freq=1",
            "--debug.seed=0",
        ]

    @contextlib.contextmanager
    def _trainer(self, tokens: torch.Tensor, bag_sizes: Sequence[int]) -> Iterator[ThisTrainer]:
        """Yield a new trainer on these tokens, for a step of each bag size."""
        spec = dataclasses.replace(get_train_spec(self.model), build_tokenizer_fn=None)
        with run_folder() as folder, train_spec_as(self.model, spec):
            shards = write_shard(folder / "shards", tokens)
            yield (trainer := ThisTrainer(self._config(folder, shards, bag_sizes)))
            trainer.close()

    def _config(self, folder: Path, shards: Path, bag_sizes: Sequence[int]) -> JobConfig:
        superposition = [size for size in bag_sizes if size > 1]
        data = [f"--{part}.dataset=token_shards" for part in ("training", "validation")]
        data += [f"--{part}.dataset_path={shards}" for part in ("training", "validation")]
        arguments = [
            *self._job(folder),
            *data,
            f"--training.steps={len(bag_sizes)}",
            f"--superposition.bag_size={max(bag_sizes)}",
            "--validation.enable",
            "--validation.freq=1000",
            f"--validation.seq_len={L}",
            f"--validation.local_batch_size={B}",
            "--validation.steps=1",
        ]
        if superposition:
            arguments.append(f"--superposition.steps={len(superposition)}")
        return SuperpositionConfigManager().parse_args(arguments)


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """Yield a folder, in the environment of a launch with one process."""
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    one |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, one),
        mock.patch("torchtitan.train.time.sleep"),  # it waits for other ranks at the end
    ):
        try:
            yield Path(folder)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def write_shard(folder: Path, tokens: torch.Tensor) -> Path:
    """Write one token shard with these tokens; return its folder."""
    file = TokenizedFile(
        str(folder),
        "00000.ds",
        tokenizer_name_or_path="none",
        save_final_metadata=True,
        token_size=2,
    )
    file.write(tokens.tolist(), None)
    file.close()
    return folder
