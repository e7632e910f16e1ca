"""What is a document and what is refused, alike where training and where tokenization reads."""

import contextlib
import gzip
import itertools
import json
import pickle
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.data.errors import DataError, RecordError
from torchtitan.experiments.tst.data.shards.tokenization import Options, UpstreamTokenizer
from torchtitan.experiments.tst.data.shards.tokenization_input import (
    TokenizationError,
    build_reader,
    list_inputs,
)
from torchtitan.experiments.tst.data.text.dataset import TextDataset
from torchtitan.experiments.tst.data.text.records import read_documents

A = b'{"text": "a"}'
LINES = {  # of JSON: the texts, or what is said of record 1
    "NaN": (b'{"x": NaN, "y": -Infinity, "z": 1e999, "text": "b"}', ["b"]),
    "an integer of many digits": (b'{"x": ' + b"1" * 5000 + b', "text": "b"}', ["b"]),
    "spaces": (b' \t{"text": "b"} \r', ["b"]),
    "a blank line": (b" \t\r", []),
    "a blank line of other spaces": ("\u3000".encode(), []),
    "no text": (b'{"text": ""}', []),
    "white space": (b'{"text": " \\n"}', [" \n"]),
    "a line separator": ('{"text": "b\u2028c\x85"}'.encode(), ["b\u2028c\x85"]),
    "a surrogate pair": (b'{"text": "\\ud83d\\ude42"}', ["🙂"]),
    "a lone surrogate elsewhere": (b'{"x": "\\ud800", "text": "b"}', ["b"]),
    "a lone surrogate": (b'{"text": "b\\ud800"}', r"has a lone surrogate, '\\ud800'"),
    "null": (b'{"text": null}', "its field 'text' is null, but must be a string"),
    "a number": (b'{"text": 1}', "its field 'text' is a number"),
    "true": (b'{"text": true}', "its field 'text' is true or false"),
    "an object": (b'{"text": {"text": "b"}}', "its field 'text' is a JSON object"),
    "another field": (
        b'{"content": "b", "id": 1}',
        "no field 'text'; its fields are 'content', 'id'",
    ),
    "no object": (b'"text"', "it is a string; each line must be one JSON object"),
    "an array": (b'[{"text": "b"}]', "it is a JSON array; each line must be one JSON object"),
    "an array on many lines": (b"[", "it is the beginning of a JSON array; each line must be"),
    "no JSON": (b"{'text': 'b'}", "it is not valid JSON .*each line must be one JSON object"),
    "two in a line": (A + A, r"it is not valid JSON \(Extra data"),
    "too deep": (b'{"x": ' + b"[" * 200_000, "it is not valid JSON"),
    "cut off": (A[:-3], "it is not valid JSON"),
    "Latin-1": (b'{"text": "\xe9"}', "it is not UTF-8"),
    "a surrogate as bytes": (b'{"text": "\xed\xa0\x80"}', "it is not UTF-8"),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_line(tmp_path, kind):
    line, expected = LINES[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(A + b"\n" + line + b"\n" + A)
    if isinstance(expected, list):
        assert [document.text for document in read_documents(str(path))] == ["a", *expected, "a"]
        return
    documents = read_documents(str(path))
    assert next(documents) == (0, "a")
    with pytest.raises(RecordError, match=rf"^{path}, record 1 \(line 2\): .*{expected}"):
        next(documents)


def test_lines_without_a_record_are_not_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + A + b'\n\n{"text": ""}\n' + A + b"\n\n{}")
    documents = read_documents(str(path))
    assert list(itertools.islice(documents, 2)) == [(0, "a"), (2, "a")]
    with pytest.raises(RecordError, match=r"record 3 \(line 7\)"):
        next(documents)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_the_beginning_of_a_file(tmp_path, compress):
    """Compressed ones are known by their first bytes too, as in the cache of the hub."""
    suffix = {gzip.compress: ".gz", zstandard.compress: ".zst"}.get(compress, "")
    for path in (tmp_path / f"a.jsonl{suffix}", tmp_path / "0123456789abcdef"):
        path.write_bytes(compress(b"\xef\xbb\xbf" + A))
        assert list(read_documents(str(path))) == [(0, "a")]
        path.write_bytes(compress(A.decode().encode("utf-16")))
        with pytest.raises(RecordError, match=r"record 0 \(line 1\): it is not UTF-8 .*UTF-16"):
            list(read_documents(str(path)))


def dictionary(values):
    return pa.array(values).dictionary_encode()


COLUMNS = {  # a table: its documents, or what is said
    "strings": ({"text": ["a", "", "b"]}, [(0, "a"), (2, "b")]),
    "large strings": ({"text": pa.array(["a"], pa.large_string())}, [(0, "a")]),
    "a dictionary": ({"text": dictionary(["a", "b", "a"])}, [(0, "a"), (1, "b"), (2, "a")]),
    "other columns": ({"text.x": [None], "text": ["a"], "x": [float("nan")]}, [(0, "a")]),
    "no rows": ({"text": pa.array([], pa.string())}, []),
    "no rows, no column": ({"x": pa.array([], pa.int64())}, []),
    "null": (
        {"text": ["a", None], "x": [1, 2]},
        r"record 1: its column 'text' is null.*'x' \(int64\)",
    ),
    "null in a dictionary": (
        {"text": dictionary(["a", None])},
        "record 1: its column 'text' is null",
    ),
    "nothing but null": ({"text": pa.nulls(2)}, "record 0: its column 'text' is null"),
    "numbers": ({"text": [1]}, r"record 0: its column 'text' is of type int64.*'text' \(int64\)"),
    "bytes": ({"text": [b"a"]}, "record 0: its column 'text' is of type binary"),
    "no such column": (
        {"x": [1], "y": ["a"]},
        r"record 0: it has no column 'text'.*'x' .*'y' \(str",
    ),
    "no UTF-8": (
        {"text": pa.array([b"a", b"\xff"]).view(pa.string())},
        "record 1: its text is not UTF-8",
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_table(tmp_path, kind):
    table, expected = COLUMNS[kind]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(table), path)
    if isinstance(expected, list):
        assert list(read_documents(str(path))) == expected
        return
    with pytest.raises(RecordError, match=rf"^{path}, {expected}"):
        list(read_documents(str(path)))


def test_rows_are_counted_over_batches(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [str(number) for number in range(2500)] + [None]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=700)
    documents = read_documents(str(path))
    assert all(next(documents) == (number, str(number)) for number in range(2500))
    with pytest.raises(RecordError, match="record 2500: "):
        next(documents)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_what_a_download_left_behind_is_named(tmp_path, name):
    path = tmp_path / name
    for content, said in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("<!DOCTYPE html>\n<html>", "is a web page"),
    ):
        path.write_text(content)
        with pytest.raises(RecordError, match=f"^{path} {said}"):
            list(read_documents(str(path)))


def test_parquet_of_another_name(tmp_path):
    path = tmp_path / "0123456789abcdef"
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(RecordError, match=f"^{path} is Parquet, not JSON lines"):
        list(read_documents(str(path)))


def test_an_error_crosses_processes():
    error = pickle.loads(pickle.dumps(RecordError("a file, record 0")))
    assert isinstance(error, DataError)
    assert str(error) == "a file, record 0"


# Both ways of reading, on any corpus

texts = st.text(st.characters(codec="utf-8"), max_size=8)
BAD = None  # no text, and an error
# a line of JSON, and its text; "" for one that is skipped, which counts if it is no blank line
good_lines = st.one_of(
    texts.map(lambda text: (json.dumps({"text": text}).encode(), text)),
    texts.map(lambda text: (json.dumps({"text": text}, ensure_ascii=False).encode(), text)),
    texts.map(lambda text: (json.dumps({"x": float("nan"), "text": text}).encode(), text)),
    st.sampled_from([b"", b" ", b"\t\r"]).map(lambda line: (line, "")),
)
bad_lines = st.sampled_from(
    [line for line, expected in LINES.values() if isinstance(expected, str) and len(line) < 100]
).map(lambda line: (line, BAD))


def mostly(good, bad):
    return st.integers(0, 15).flatmap(lambda number: good if number else bad)


json_files = st.tuples(
    st.lists(mostly(good_lines, bad_lines), max_size=6), st.booleans(), st.sampled_from(["", ".gz"])
)
tables = st.tuples(
    st.lists(mostly(texts, st.none()), max_size=6),
    st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
)


def write_json_lines(path, lines, bom, suffix):
    """Returns the file and the text of each record."""
    content = b"\xef\xbb\xbf" * bom + b"\n".join(line for line, _ in lines)
    path = path.with_suffix(f".jsonl{suffix}")
    path.write_bytes(gzip.compress(content) if suffix else content)
    return path, [text for line, text in lines if line.strip()]


def write_table(path, values, kind):
    path = path.with_suffix(".parquet")
    pq.write_table(pa.table({"text": pa.array(values, kind)}), path)
    return path, values


corpora = st.one_of(
    st.tuples(st.just("jsonl"), st.lists(json_files, min_size=1, max_size=3)),
    st.tuples(st.just("parquet"), st.lists(tables, min_size=1, max_size=3)),
)


@pytest.fixture(scope="module")
def encoder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unused")
    return UpstreamTokenizer(folder, Options(str(corpus / "tokenizer"))).tokenizer


@pytest.fixture(scope="module")
def config(base_args):
    return SuperpositionConfigManager().parse_args([*base_args, "--training.seq_len=3"])


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(corpora, st.integers(0, 20))
def test_both_ways_of_reading_agree(encoder, config, drawn, stop):
    dataset, files = drawn
    write = write_json_lines if dataset == "jsonl" else write_table
    with tempfile.TemporaryDirectory() as folder:
        written = [write(Path(folder, str(n)), *file) for n, file in enumerate(files)]
        expected, bad = [], None
        for path, values in written:
            for number, text in enumerate(values):
                if text is BAD and not bad:
                    bad = f"{path}, record {number}"
                if text and not bad:
                    expected.append(encoder.upstream.encode(text, add_bos=True, add_eos=True))
        trained, refused = train_on(dataset, folder, encoder.upstream, config, stop)
        tokenized, also_refused = tokenize(folder, encoder)
        if bad:
            assert refused == also_refused
            assert refused.startswith(bad)
        elif not expected:
            for said in (refused, also_refused):
                assert "no document" in said or "no file to read" in said
        else:
            assert not refused + also_refused
            assert trained == list(itertools.chain(*expected))
            assert tokenized == expected


def train_on(dataset, folder, tokenizer, config, stop):
    """The tokens that training reads, and why it ends; the same after a resume."""
    config.training.dataset, config.training.dataset_path = dataset, folder
    tokens, state, rest = [], None, []
    try:
        stream = TextDataset("training", 0, 1, tokenizer, config, infinite=False)
        for number, (inputs, labels) in enumerate(stream):
            tokens += [*inputs["input"].tolist(), labels[-1].item()]
            if number == stop:
                state = pickle.dumps(stream.state_dict())
        tokens += stream._token_buffer
    except DataError as error:
        return tokens, str(error)
    if state:
        resumed = TextDataset("training", 0, 1, tokenizer, config, infinite=False)
        resumed.load_state_dict(pickle.loads(state))
        for inputs, labels in resumed:
            rest += [*inputs["input"].tolist(), labels[-1].item()]
        length = config.training.seq_len + 1
        assert rest + resumed._token_buffer == tokens[(stop + 1) * length :]
    return tokens, ""


def tokenize(folder, encoder):
    """The tokens of each document that tokenization reads, and why it ends."""
    found = []
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        try:
            inputs = list_inputs(folder, "text")
            with tempfile.NamedTemporaryFile("w+") as file:
                file.writelines(f"{path}\n" for path in inputs)
                file.flush()
                reader = build_reader(folder, Path(file.name), "text", {})
                for document in reader.run():
                    found += [each.ids for each in encoder.encode_batch([document.text])]
        except TokenizationError as error:
            return found, str(error)
    return found, ""
