"""Read the documents of text corpora.

    file (JSON lines or Parquet, local or a URL) -> records -> documents (texts that are not empty)

Training on text and ``tst tokenize`` both read with these functions. So both read the same
documents, and refuse the same records with the same errors. Blank lines and empty texts are
skipped. Every other record without a text is an error, which names the file and the record.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ...file_checks import what_is_wrong
from ..errors import RecordError

TEXT_KEY = "text"  # default name of the field that holds the text
PARQUET = (".parquet",)

_HINT = "if the text has another name, set text_dataset.text_key (`tst tokenize --text-key`)"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_MAGIC_NUMBERS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_PARQUET_MAGIC = b"PAR1"
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16 or UTF-32", b"\xfe\xff": "UTF-16"}
# Numbers become floats, because Python refuses integers of more than 4300 digits.
_JSON = json.JSONDecoder(parse_int=float)
_BATCH = 1000  # rows of Parquet read at a time


class Document(NamedTuple):
    """The text of a document, and the number of its record in the file (from 0)."""

    number: int
    text: str


def read_documents(file: str, text_key: str = TEXT_KEY) -> Iterator[Document]:
    """Read the documents of one file in order: Parquet if it has the suffix, else JSON lines.

    Args:
        file: path or URL.
        text_key: name of the field, or the column, that holds the text.

    Raises:
        RecordError: at the first record that is not a document; names file, record and field.
    """
    return (read_parquet if file.endswith(PARQUET) else read_json_lines)(file, text_key)


def read_json_lines(file: str, text_key: str = TEXT_KEY) -> Iterator[Document]:
    """Read the documents of JSON lines, plain or compressed, as :func:`read_documents`.

    The suffix (.gz, .zst) tells the compression. Without one, the first bytes do.
    """
    number = 0
    try:
        with _open(file) as raw:
            for line_number, line in enumerate(_decompress(file, raw), 1):
                place = f"{file}, record {number} (line {line_number})"
                content = _decode(line, place, line_number == 1)
                if not content.strip():
                    continue
                if text := text_of(_parse(content, place), text_key, place):
                    yield Document(number, text)
                number += 1
    except Exception as error:  # the file system may raise anything
        raise _fault(file, number, error) from error


def read_parquet(file: str, text_key: str = TEXT_KEY) -> Iterator[Document]:
    """Read the documents of Parquet, only one column of it, as :func:`read_documents`."""
    number = 0
    try:
        with _open(file) as raw, pq.ParquetFile(raw) as table:
            if not table.metadata.num_rows:
                return
            _check_column(table.schema_arrow, text_key, f"{file}, record 0")
            for batch in table.iter_batches(batch_size=_BATCH, columns=[text_key]):
                for text in _strings(batch.column(text_key), f"{file}, record", number):
                    if text is None:
                        raise RecordError(
                            f"{file}, record {number}: its column {text_key!r} is null, but must "
                            f"be a string; the columns are {_columns(table.schema_arrow)}; {_HINT}"
                        )
                    if text:
                        yield Document(number, text)
                    number += 1
    except Exception as error:  # the file system may raise anything
        raise _fault(file, number, error) from error


def text_of(record: Any, text_key: str, place: str) -> str:
    """Return the text of a record; it may be empty.

    Args:
        record: parsed record, with any values.
        text_key: name of the field that holds the text.
        place: file and number of the record, for errors.

    Raises:
        RecordError: if the record is not an object, or its text is not a string that can be
            tokenized.
    """
    if not isinstance(record, dict):
        raise RecordError(
            f"{place}: it is {_kind(record)}; each line must be one JSON object, such as "
            f'{{"{text_key}": "..."}}'
        )
    if text_key not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise RecordError(
            f"{place}: it has no field {text_key!r}; its fields are {fields[:300]}; {_HINT}"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise RecordError(
            f"{place}: its field {text_key!r} is {_kind(text)}, but must be a string; {_HINT}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{place}: its field {text_key!r} has a lone surrogate, "
            f"{text[error.start]!a}, which is not a character; fix the text or remove the record"
        ) from None
    return text


def _open(file: str) -> IO[bytes]:
    if "://" not in file:
        return open(file, "rb")  # noqa: PTH123
    from datasets.utils.file_utils import xopen  # retries if a connection breaks

    return xopen(file, "rb")


def _decompress(file: str, raw: IO[bytes]) -> io.BufferedReader:
    """Return the lines of a file; a compressed file that is cut off raises an error at its end."""
    compression = next((c for suffix, c in _COMPRESSIONS.items() if file.endswith(suffix)), None)
    if not compression:
        start = raw.read(4)
        raw.seek(0)
        if start == _PARQUET_MAGIC:
            raise RecordError(
                f'{file} is Parquet, not JSON lines; set training.dataset = "parquet", or rename '
                f"it to end in {PARQUET[0]}"
            )
        found = (c for magic, c in _MAGIC_NUMBERS.items() if start.startswith(magic))
        compression = next(found, None)
    stream = pa.input_stream(pa.PythonFile(raw, mode="r"), compression=compression)
    return io.BufferedReader(stream)


def _decode(line: bytes, place: str, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        other = next((name for mark, name in _OTHER_ENCODINGS.items() if line.startswith(mark)), "")
        seems = f"it seems to be {other}" if first and other else f"byte {error.start} of the line"
        raise RecordError(
            f"{place}: it is not UTF-8 ({seems}: {error.reason}); convert the file to UTF-8"
        ) from None


def _parse(content: str, place: str) -> Any:
    try:
        return _JSON.decode(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith("["):
            what = "it is the beginning of a JSON array"
        else:
            what = f"it is not valid JSON ({error})"
        raise RecordError(
            f"{place}: {what}; each line must be one JSON object. The line: "
            f"{content.strip()[:100]!r}"
        ) from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds: dict[type, str] = {bool: "true or false", list: "a JSON array", dict: "a JSON object"}
    return kinds.get(type(value), "a string" if isinstance(value, str) else "a number")


def _check_column(schema: pa.Schema, text_key: str, place: str) -> None:
    """Check that a table has one column of the name, and that it holds strings."""
    count = schema.names.count(text_key)
    if count != 1:
        raise RecordError(
            f"{place}: it has {count or 'no'} column{'s' * (count > 1)} {text_key!r}; the columns "
            f"are {_columns(schema)}; {_HINT}"
        )
    kind = schema.field(text_key).type
    kind = getattr(kind, "storage_type", kind)  # for an extension type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_string = pa.types.is_string(value) or pa.types.is_large_string(value)
    if not (is_string or value in _STRING_VIEWS or pa.types.is_null(value)):
        raise RecordError(
            f"{place}: its column {text_key!r} is of type {kind}, but must have strings; the "
            f"columns are {_columns(schema)}; {_HINT}"
        )


_STRING_VIEWS = [pa.string_view()] if hasattr(pa, "string_view") else []


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name!r} ({field.type})" for field in schema)[:300] or "none"


def _strings(column: pa.Array, place: str, number: int) -> Iterator[str | None]:
    """Yield the strings of a column; one that is not UTF-8 raises an error with its record."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for offset, value in enumerate(column):
            try:
                yield value.as_py()
            except UnicodeDecodeError as error:
                raise RecordError(
                    f"{place} {number + offset}: its text is not UTF-8 (byte {error.start}: "
                    f"{error.reason})"
                ) from None


def _fault(file: str, number: int, error: Exception) -> RecordError:
    """Return the error to raise for an error in a file, at a record."""
    if not number and "://" not in file and (wrong := what_is_wrong(Path(file))):
        return RecordError(f"{file} {wrong}")
    if isinstance(error, RecordError):
        return error
    where = f"{file}, record {number}:" if number else file
    return RecordError(f"{where} cannot be read: {type(error).__name__}: {error}")
