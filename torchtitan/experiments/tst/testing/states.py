"""Read the state in a checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return all tensors and plain values in a checkpoint by name."""
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(checkpoint, file.name)
        folders = [("", torch.load(file.name, weights_only=False))]
    flat = {}
    while folders:
        prefix, folder = folders.pop()
        for key, value in folder.items():
            if isinstance(value, dict):
                folders.append((f"{prefix}{key}.", value))
            else:
                flat[f"{prefix}{key}"] = value
    return flat
