"""Small jobs on TorchTitan 0.3, trained in this process."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.llama3 import config_registry as llama3
from torchtitan.models.qwen3 import config_registry as qwen3
from torchtitan.trainer import Trainer

from torchtitan.experiments.tst.titan03.superposed import superposed

B, L, S = 2, 32, 4  # sequences, tokens of a sequence, bag size


def ordinary(folder: Path, corpus: Path, model: str = "llama3", **training: Any) -> Trainer.Config:
    """A config of TorchTitan's own: two layers of a debug model, on text, without chunks."""
    config = {"llama3": llama3.llama3_debugmodel, "qwen3_moe": qwen3.qwen3_moe_debug}[model]()
    spec = config.model_spec
    layers = spec.model.layers[:2]
    for layer in layers:
        if moe := getattr(layer, "moe", None):  # 8 of its 64 experts
            moe.num_experts = moe.router.num_experts = moe.router.gate.out_features = 8
            moe.routed_experts.inner_experts.num_experts = 8
            moe.routed_experts.token_dispatcher.num_experts = 8
    config.model_spec = dataclasses.replace(
        spec, model=dataclasses.replace(spec.model, layers=layers)
    )
    config.loss = CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)
    config.dataloader = text(corpus)
    config.hf_assets_path = str(corpus / "tokenizer")
    config.dump_folder = str(folder)
    config.training = dataclasses.replace(
        config.training,
        **{"seq_len": L, "local_batch_size": B, "steps": 6, "mixed_precision_param": "float32"}
        | training,
    )
    config.lr_scheduler.warmup_steps = 2
    config.metrics.log_freq = 1
    config.metrics.disable_color_printing = True
    config.debug = dataclasses.replace(config.debug, seed=0, enable_structured_logging=False)
    config.validator.dataloader = dataclasses.replace(text(corpus), infinite=False)
    return config


def text(corpus: Path) -> HuggingFaceTextDataLoader.Config:
    """The corpus's train.jsonl as text."""
    return HuggingFaceTextDataLoader.Config(dataset="c4_test", dataset_path=str(corpus / "text"))


def tst(config: Trainer.Config, bag_size: int = S, steps: int = 3, **keys: Any) -> Any:
    """The same job with superposition."""
    return superposed(config, bag_size=bag_size, steps=steps, **keys)


def saving(interval: int = 1, **keys: Any) -> CheckpointManager.Config:
    """Full checkpoints, all of which stay."""
    return CheckpointManager.Config(
        **{"enable": True, "interval": interval, "keep_latest_k": 0, "last_save_model_only": False}
        | keys
    )


class Recorder:
    """Keeps loss, gradient norm and micro-batches of each step of a trainer."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.losses: dict[int, float] = {}
        self.norms: dict[int, float] = {}
        self.read: list[tuple[torch.Tensor, torch.Tensor]] = []
        log, generator = trainer.metrics_processor.log, trainer.batch_generator

        def record(step: int, loss: float, highest: float, norm: float, **kwargs: Any) -> None:
            self.losses[step], self.norms[step] = loss, norm
            log(step, loss, highest, norm, **kwargs)

        def batches(data_iterable: Any) -> Iterator[Any]:
            for input_dict, labels in generator(data_iterable):
                self.read.append((input_dict["input"], labels))
                yield input_dict, labels

        trainer.metrics_processor.log = record
        trainer.batch_generator = batches


@contextlib.contextmanager
def built(config: Trainer.Config) -> Iterator[Trainer]:
    """A trainer, in the environment of a launch with one process."""
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    with mock.patch.dict(os.environ, one | {"MASTER_PORT": "0"}), mock.patch("time.sleep"):
        trainer = config.build()
        try:
            yield trainer
        finally:
            trainer.close()
            dist.destroy_process_group()


def train(config: Trainer.Config) -> Recorder:
    """Train a config; returns what was recorded."""
    with built(config) as trainer:
        recorder = Recorder(trainer)
        trainer.train()
    return recorder
