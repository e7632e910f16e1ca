"""Open a checkpoint that somebody else may have made, without running code from it.

DCP pickles its metadata and every value that is not a tensor, and upstream pickles the loader's
state. When they open a checkpoint, it can run any code. This module loads only plain values,
tensors and DCP's own records.
"""

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torchtitan.components.checkpoint import DATALOADER
from typing_extensions import override

from ...upstream.names import MEM_FORMAT_ENCODING
from .manifests import METADATA, CheckpointError

_DCP_RECORDS = {
    dcp_metadata.__name__: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    dcp_filesystem.__name__: {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


class PlainUnpickler(pickle.Unpickler):
    """Unpickles numbers, strings, bytes, lists, tuples, dicts and sets; refuses anything else."""

    @classmethod
    def loads(cls, data: bytes) -> Any:
        """Unpickle ``data``.

        Raises:
            pickle.UnpicklingError: for anything else; the message names it.
        """
        return cls(io.BytesIO(data)).load()

    @override
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused to load {module}.{name} from a checkpoint")


class _MetadataUnpickler(PlainUnpickler):
    """Unpickles plain values and the records of DCP's metadata."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        known = name in _DCP_RECORDS.get(module, ())
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return pickle.Unpickler.find_class(self, module, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if module.startswith("pathlib") and name == "PosixPath":  # the path it was written to
            return PurePosixPath
        return super().find_class(module, name)


def _memory_format(kind: Any, name: Any) -> Any:
    """Replace ``getattr``, which Python 3.11.0 to 3.11.3 use to pickle members of enums."""
    if kind is not MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"refused to load {kind!r}.{name} from a checkpoint")
    return kind[name]


class SafeReader(FileSystemReader):
    """DCP's reader of local checkpoints, without its unpickling."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's default planner, limited to plain values and tensors."""

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)  # refuses what DCP itself would run
        if isinstance(loaded, bytes) and read_item.dest_index.fqn.startswith(f"{DATALOADER}."):
            PlainUnpickler.loads(loaded)  # refuses what upstream's loader would run
        harmless = io.BytesIO()
        torch.save(loaded, harmless)
        harmless.seek(0)
        super().load_bytes(read_item, harmless)


def read_metadata(folder: Path) -> Metadata:
    """Return DCP's metadata of a checkpoint.

    Raises:
        CheckpointError: if it is missing or damaged, or would run code.
    """
    path = folder / METADATA
    try:
        metadata = _MetadataUnpickler.loads(path.read_bytes())
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} cannot be read: not the metadata of a checkpoint")
    return metadata
