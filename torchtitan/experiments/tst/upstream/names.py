"""Private names of torch and TorchTitan that other folders need, under public ones.

The README of this folder says why each of them is needed. A test checks that each still exists.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torchtitan.protocols.train_spec as train_spec_module
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.checkpoint._hf_utils import SHARDED_DIR_NAME as SHARDED_DIR_NAME
from torch.distributed.checkpoint._hf_utils import _metadata_fn as WEIGHTS_INDEX
from torch.distributed.checkpoint.filesystem import _FileSystemWriter as FileSystemWriter
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MEM_FORMAT_ENCODING
from torch.distributed.pipelining.schedules import (
    _PipelineScheduleRuntime as PipelineScheduleRuntime,
)
from torch.optim.lr_scheduler import LRScheduler
from torchtitan.components.metrics import BaseLogger, LoggerContainer
from torchtitan.components.metrics import _get_metrics_rank as metrics_rank
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset
from torchtitan.protocols.model_converter import _registry_model_converter_cls as CONVERTERS
from torchtitan.protocols.train_spec import TrainSpec

from .replaced import replaced_items

__all__ = [
    "CONVERTERS",
    "MEM_FORMAT_ENCODING",
    "SHARDED_DIR_NAME",
    "WEIGHTS_INDEX",
    "FakeTensor",
    "FileSystemWriter",
    "PipelineScheduleRuntime",
    "compile_backends",
    "data_of",
    "loggers_of",
    "metrics_rank",
    "set_last_rates",
    "train_spec_as",
]


def compile_backends(exclude: tuple[str, ...] = ("debug", "experimental")) -> list[str]:
    """Return the names of torch.compile's backends, except those with the excluded tags."""
    from torch._dynamo import list_backends  # this import takes a second

    return list_backends(exclude_tags=exclude)


def data_of(dataset: HuggingFaceTextDataset) -> Any:
    """Return the ``datasets`` object that a text dataset of TorchTitan reads."""
    return dataset._data


def loggers_of(container: LoggerContainer) -> list[BaseLogger]:
    """Return the loggers of a container."""
    return list(container._loggers)


def set_last_rates(scheduler: LRScheduler, rates: Sequence[Any]) -> None:
    """Set the learning rates that a scheduler returns for its last step."""
    scheduler._last_lr = list(rates)


def train_spec_as(name: str, spec: TrainSpec) -> AbstractContextManager[None]:
    """Make TorchTitan find ``spec`` under the name of a model in this context."""
    return replaced_items(train_spec_module._extra_train_specs, {name: spec})
