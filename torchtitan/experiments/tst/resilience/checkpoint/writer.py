"""Write a checkpoint in DCP's format, and compute the checksum of each file while writing."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from typing_extensions import override

from ...upstream.names import FileSystemWriter
from .inventory import step_folder
from .manifests import METADATA, file_entry, new_checksum, write_manifest
from .moves import publish


class CheckpointWriter(FileSystemWriter):
    """Writes ``saving-N``, manifest last, and renames it to ``step-N`` when everything is on disk.

    The base class is not DCP's public FileSystemWriter, because that one also does the staging of
    an async save, on CPU without a copy.

    Args:
        folder: folder of the run's checkpoints.
        step: N.
        manifest: content of the manifest except for the files; if ``manifest["boundary"]`` is true,
            the link ``boundary`` will name this checkpoint.
    """

    def __init__(self, folder: Path, step: int, manifest: dict[str, Any]):
        super().__init__(step_folder(folder, step, "saving"))
        self.fs: _ChecksummingFileSystem = _ChecksummingFileSystem()
        self.folder, self.step, self.manifest = folder, step, manifest

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        shutil.rmtree(self.path, ignore_errors=True)  # left by a save that was cut short
        Path(self.path).mkdir(parents=True)
        return super().prepare_global_plan(plans)

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = _Written(super().write_data(plan, planner).wait())
        written.files = self.fs.take()
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        files: dict[str, dict] = {}
        for written in results:
            assert isinstance(written, _Written)
            files |= written.files
        (files[METADATA],) = self.fs.take().values()  # it was written under another name
        write_manifest(Path(self.path), self.manifest, files)
        publish(self.folder, self.step, self.manifest["boundary"])


class _Written(list):
    """A rank's write results, with the manifest's entries of its files."""

    files: dict[str, dict]


class _ChecksummingFileSystem(FileSystem):
    """A file system that records the manifest's entry of every file that it writes."""

    def __init__(self) -> None:
        self.written: dict[str, dict] = {}

    def take(self) -> dict[str, dict]:
        """Return the entries of the files written since the last call."""
        written, self.written = self.written, {}
        return written

    @override
    @contextmanager
    def create_stream(self, path, mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _ChecksummingStream(io.FileIO(path, "w")) as stream:
            yield stream
        self.written[Path(path).name] = file_entry(stream.size, stream.checksum.hexdigest())


class _ChecksummingStream(io.BufferedWriter):
    """A stream that computes the checksum of what is written, from beginning to end."""

    def __init__(self, raw: io.RawIOBase):
        super().__init__(raw)
        self.size, self.checksum = 0, new_checksum()

    @override
    def write(self, data) -> int:
        self.checksum.update(data)
        size = super().write(data)
        self.size += size
        return size

    @override
    def fileno(self) -> int:
        self.flush()  # DCP calls this to sync the file
        return super().fileno()

    @override
    def seek(self, *args) -> int:
        raise io.UnsupportedOperation("a file with a checksum must be written in order")

    @override
    def seekable(self) -> bool:
        return False
