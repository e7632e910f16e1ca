"""Read the source of ``tst tokenize``, for datatrove."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.readers import HuggingFaceDatasetReader
from datatrove.pipeline.readers.base import BaseDiskReader, BaseReader
from fsspec.core import url_to_fs
from huggingface_hub import dataset_info
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from typing_extensions import override

from ...errors import UserError
from ..errors import DataError, RecordError
from ..text.files import JSONL, check_documents, data_files
from ..text.records import PARQUET, read_documents, text_of

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_TIMEOUT = 30  # (s)


class TokenizationError(UserError, ValueError):
    """A corpus that cannot be tokenized; the message names the cause."""


def list_inputs(source: str, text_key: str) -> list[str]:
    """List the files of a source, and print which are read and which are skipped.

    Args:
        source: a file, a folder, a pattern, a URL, or the name of a dataset on the hub.
        text_key: field of a record that holds the text.

    Returns:
        Paths from the root of the source's file system; empty for a dataset on the hub.

    Raises:
        TokenizationError: if there is nothing to read.
    """
    if _is_hub_name(source):
        _check_hub_name(source)
        return []
    try:
        files = data_files(source, JSONL + PARQUET)
        kinds = {file.endswith(PARQUET) for file in files.read}
        if len(kinds) > 1:
            raise DataError(
                f"must have either JSON lines ({', '.join(JSONL)}) or Parquet ({PARQUET[0]}), but "
                f"has {files}; tokenize them separately"
            )
        is_local = "://" not in files.read[0]
        if is_local:
            check_documents(files, read_documents, text_key)
    except RecordError as error:
        raise TokenizationError(str(error)) from error
    except DataError as error:
        raise TokenizationError(f"{source}: {error}") from error
    print(f"Reading {files}")
    if warning := files.warning():
        print(f"warning: not all files in {source} are read: {warning}", file=sys.stderr)
    if is_local:
        return [str(Path(file).absolute()).removeprefix("/") for file in files.read]
    fs = url_to_fs(source)[0]
    return [fs._strip_protocol(file).removeprefix("/") for file in files.read]


def _is_hub_name(source: str) -> bool:
    is_file = source.endswith(JSONL + PARQUET) or Path(source).exists()
    return bool(_HUB_NAME.fullmatch(source)) and not is_file


def _check_hub_name(source: str) -> None:
    """Check that the hub has a dataset of this name."""
    try:
        dataset_info(source, timeout=_HUB_TIMEOUT)
        return
    except (RepositoryNotFoundError, HFValidationError):
        why = "not found there"
    except Exception as error:  # the HTTP library depends on the version of huggingface_hub
        why = f"cannot reach it: {type(error).__name__}: {error}"
    raise TokenizationError(
        f"{source}: neither a file or folder here nor a dataset on the Hugging Face hub ({why})"
    )


def build_reader(
    source: str, inputs: Path, text_key: str, dataset: dict[str, str | None]
) -> BaseReader:
    """Return the datatrove step that reads a source.

    Args:
        source: the source, as for :func:`list_inputs`.
        inputs: file with the paths that :func:`list_inputs` returned, one a line.
        text_key: field of a record that holds the text.
        dataset: configuration and split of a dataset on the hub.
    """
    if not inputs.read_text():
        return HuggingFaceDatasetReader(
            source, dataset, streaming=True, text_key=text_key, adapter=_text_only
        )
    fs = url_to_fs(source)[0]
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    root = (fs.root_marker or f"{protocol}://", fs)
    return _Records(root, paths_file=str(inputs), text_key=text_key)


def _text_only(
    reader: BaseReader, record: dict[str, Any], path: str, number: int | str
) -> dict[str, Any]:
    """Return the text of a record, as datatrove's adapter for a dataset on the hub.

    Datatrove skips an empty text.
    """
    place = f"{path}, record {number}"
    try:
        return {"text": text_of(record, reader.text_key, place), "id": place}
    except DataError as error:
        raise TokenizationError(str(error)) from error


class _Records(BaseDiskReader):
    """Datatrove's reader of files, with the same documents as training on text."""

    name = "Documents"

    @override
    def read_file(self, filepath: str) -> Iterator[Document]:
        path = self._full_path(filepath)
        try:
            for number, text in read_documents(path, self.text_key):
                yield Document(text, f"{path}/{number}")
        except DataError as error:
            raise TokenizationError(str(error)) from error

    def _full_path(self, filepath: str) -> str:
        if "://" in filepath:  # some file systems have such paths only
            return filepath
        path = self.data_folder.resolve_paths(filepath)
        return path.removeprefix("/") if path.startswith("//") else path
