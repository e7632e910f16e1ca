"""Metadata as other versions of Python write it, and as an attacker would."""

import enum
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from torchtitan.experiments.tst.resilience.checkpoint.manifests import CheckpointError
from torchtitan.experiments.tst.resilience.checkpoint.reader import read_metadata

TENSOR = TensorStorageMetadata(
    TensorProperties(dtype=torch.float32),
    torch.Size([2, 3]),
    [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))],
)


class OldPickler(pickle.Pickler):
    """Members of enums by getattr, as Python 3.11.0 to 3.11.3 pickle them."""

    def reducer_override(self, obj):
        if isinstance(obj, enum.Enum):
            return getattr, (type(obj), obj.name)
        return NotImplemented


def written(folder, metadata):
    file = io.BytesIO()
    OldPickler(file).dump(metadata)
    (folder / ".metadata").write_bytes(file.getvalue())
    assert b"getattr" in file.getvalue()
    return folder


def test_enums_of_python_3_11_0_to_3(tmp_path):
    assert read_metadata(written(tmp_path, Metadata({"w": TENSOR}))).state_dict_metadata == {
        "w": TENSOR
    }


class Lookup:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


@pytest.mark.parametrize("arguments", [(TensorProperties, "create_from_tensor"), (TENSOR, "size")])
def test_getattr_of_anything_else_is_refused(tmp_path, arguments):
    metadata = Metadata({"w": TENSOR}, planner_data=Lookup(*arguments))
    with pytest.raises(CheckpointError, match="refused to load"):
        read_metadata(written(tmp_path, metadata))
