"""The trainer for TorchTitan 0.3, as the conformance suite sees it.

    tst conformance tests/titan03/conformance_of_trainer_of_03.py

It trains by the real ``SuperpositionTrainer``, on TorchTitan's kind of loader, and without TST by
TorchTitan's own ``Trainer``. All runs are in this process, in float32.
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
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import Validator
from torchtitan.config import TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.trainer import Trainer

from torchtitan.experiments.tst.core import BagLoss, fold
from torchtitan.experiments.tst.titan03.cpu import enable_cpu_if_alone
from torchtitan.experiments.tst.titan03.models import model_spec
from torchtitan.experiments.tst.titan03.superposed import superposed
from torchtitan.experiments.tst.titan03.trainer import SuperpositionTrainer

B, L, S = 2, 16, 4
AfterStep = Callable[[torch.Tensor, torch.Tensor, float], None]
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]

enable_cpu_if_alone()


class NoTokenizer(BaseTokenizer):
    """The tokenizer of a job whose loader has tokens already."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return []

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return TST.vocab_size


class Windows(BaseDataLoader):
    """A loader of windows of L tokens, in their order, as TorchTitan's loader of text."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        tokens: list[int]
        infinite: bool = False

    def __init__(self, config: Config, **kwargs: Any):
        self.tokens = torch.tensor(config.tokens)

    def __iter__(self) -> Iterator[Batch]:
        inputs, labels = (part.unfold(0, L, L) for part in (self.tokens[:-1], self.tokens[1:]))
        positions = torch.arange(L).expand(B, L).contiguous()
        for batch in zip(inputs.split(B), labels.split(B), strict=True):
            yield {"input": batch[0].contiguous(), "positions": positions}, batch[1].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


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

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(SuperpositionTrainer.Config):
        pass


class TorchTitansTrainer(Reporting, Trainer):
    """TorchTitan's own trainer, which nothing of this package changes."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass


class TST:
    """The trainer with a small model."""

    vocab_size, sequences, seq_len, bag_size = 1024, B, L, S
    weightings = ("uniform", "power_law")
    model = ("llama3", "demo")

    def __init__(self) -> None:
        with self._trainer([0] * 1000, [S, 1]) as trainer:
            self.trainer: Any = trainer
        self.logits(torch.zeros(B, L, dtype=torch.int64))  # FSDP wants the whole model to be first

    def fold(
        self, inputs: torch.Tensor, labels: torch.Tensor, bag_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fold(inputs, labels, bag_size)

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.trainer.model_parts[0].tok_embeddings(inputs)

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        model = self.trainer.model_parts[0]
        positions = torch.arange(inputs.shape[1]).expand(inputs.shape[:2]).contiguous()
        masks = model.get_attention_masks(positions=positions)
        with self.trainer.train_context():
            return model(inputs, positions=positions, attention_masks=masks)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, weighting: str) -> torch.Tensor:
        loss, bag_loss = self.trainer.loss_fn, BagLoss("mce", weighting)
        loss.use(bag_loss)
        return loss(logits, targets, bag_loss.coefficients(bag_loss.counts(targets)))[0]

    def validate(self, inputs: torch.Tensor, labels: torch.Tensor) -> float:
        trainer, validator = self.trainer, self.trainer.validator
        positions = torch.arange(L).expand(B, L).contiguous()
        batch = ({"input": inputs, "positions": positions}, labels)
        validator.dl_config = mock.Mock(build=lambda **kwargs: [batch])
        with mock.patch.object(trainer.metrics_processor, "log_validation") as log:
            validator.validate(trainer.model_parts, step=1)
        return log.call_args.kwargs["loss"]

    def train(self, tokens: torch.Tensor, bag_sizes: Sequence[int], after_step: AfterStep) -> None:
        with self._trainer(tokens.tolist(), bag_sizes) as self.trainer:
            self.trainer.after_step = after_step
            self.trainer.train()

    def train_ordinary(self, tokens: torch.Tensor, steps: int, after_step: AfterStep) -> None:
        with run_folder() as folder:
            config = self._job(folder, tokens.tolist(), steps)
            trainer = TorchTitansTrainer.Config(**fields_of(config)).build()
            trainer.after_step = after_step
            trainer.train()
            trainer.close()

    def _job(self, folder: Path, tokens: list[int], steps: int) -> Trainer.Config:
        data = Windows.Config(tokens=tokens)
        return Trainer.Config(
            model_spec=model_spec(*self.model, seq_len=L),
            loss=CrossEntropyLoss.Config(global_vocab_size=self.vocab_size),
            tokenizer=NoTokenizer.Config(),
            dataloader=data,
            dump_folder=str(folder),
            optimizer=default_adamw(lr=1e-2),
            lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
            training=TrainingConfig(
                local_batch_size=B, seq_len=L, steps=steps, mixed_precision_param="float32"
            ),
            checkpoint=CheckpointManager.Config(),
            metrics=MetricsProcessor.Config(log_freq=1),
            validator=Validator.Config(enable=True, freq=1000, steps=1, dataloader=data),
            debug=DebugConfig(seed=0, enable_structured_logging=False),
        )

    @contextlib.contextmanager
    def _trainer(self, tokens: list[int], bag_sizes: Sequence[int]) -> Iterator[Any]:
        """Yield a new trainer on these tokens, for a step of each bag size."""
        boundary = sum(size > 1 for size in bag_sizes)
        with run_folder() as folder:
            job = self._job(folder, tokens, len(bag_sizes))
            keys = {"steps": boundary} if boundary else {}
            config = superposed(job, bag_size=max(bag_sizes), **keys)
            yield (trainer := ThisTrainer.Config(**fields_of(config)).build())
            trainer.close()


def fields_of(config: Any) -> dict[str, Any]:
    """Return the fields of a config by their names."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """Yield a folder, in the environment of a launch with one process."""
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, one | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}),
        mock.patch("torchtitan.trainer.time.sleep"),  # it waits for other ranks at the end
    ):
        yield Path(folder)  # all trainers use the same process group
