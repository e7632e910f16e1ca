"""Replace parts that TorchTitan's trainer builds in its constructor without a hook."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torchtitan.protocols.train_spec as train_spec_module
import torchtitan.train
from torchtitan.protocols.train_spec import TrainSpec

from .replaced import replaced


@contextmanager
def built_by(
    checkpoint_manager: Callable[..., Any], train_spec: Callable[[TrainSpec], TrainSpec]
) -> Iterator[None]:
    """Make a trainer that is constructed in this context use other parts.

    Args:
        checkpoint_manager: called instead of TorchTitan's ``CheckpointManager``, with its
            arguments.
        train_spec: given the model's train spec, returns the one to use.
    """
    get_train_spec = train_spec_module.get_train_spec

    def get_and_change(name: str) -> TrainSpec:
        return train_spec(get_train_spec(name))

    with (
        replaced(torchtitan.train, "CheckpointManager", checkpoint_manager),
        replaced(train_spec_module, "get_train_spec", get_and_change),
    ):
        yield
