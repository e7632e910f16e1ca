"""What is read, and what cannot be tokenized and says so."""

import dataclasses
import fcntl
import gzip
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from huggingface_hub.errors import HFValidationError

from corpora import documents, tokenize, write_jsonl
from torchtitan.experiments.tst.data.shards import tokenization_input
from torchtitan.experiments.tst.data.shards.tokenization import (
    LOCKS,
    TOKENIZE,
    Options,
    TokenizationError,
)

GOOD = b'{"text": "a"}\n' * 2000
PARQUET = pa.BufferOutputStream()
pq.write_table(pa.table({"text": ["a"] * 1000}), PARQUET)
PARQUET = PARQUET.getvalue().to_pybytes()
BAD_INPUTS = {  # name and content of a file; what is said
    "a second record": (
        GOOD[:14] + b'\n{"text": 1}\n',
        r"record 1 \(line 3\): its field 'text' is",
    ),
    "zst cut off": (zstandard.compress(GOOD)[:-9], r"cannot be read: OSError"),
    "zst cut off at the end of a line": (zstandard.compress(GOOD)[:-1], r"cannot be read: OSError"),
    "gz cut off": (gzip.compress(GOOD)[:-9], r"record \d+: cannot be read: OSError: Truncated"),
    "gz that is none": (GOOD, r"cannot be read: OSError"),
    "parquet cut off": (PARQUET[:-9], r"cannot be read: ArrowInvalid"),
    "nothing": (b"", "there is no document in 1 file"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_damaged_input_ends_the_work_with_its_name(corpus, tmp_path, kind):
    content, said = BAD_INPUTS[kind]
    suffix = {"zst": ".jsonl.zst", "gz": ".jsonl.gz", "parquet": ".parquet"}
    path = tmp_path / f"bad{suffix.get(kind.split()[0], '.jsonl')}"
    path.write_bytes(content)
    with pytest.raises(TokenizationError, match=rf"^{path}(, |: | ).*{said}"):
        tokenize(path, tmp_path / "out", Options(str(corpus / "tokenizer")))


def test_several_frames_are_all_read(corpus, tmp_path):
    for suffix, compress in {"zst": zstandard.compress, "gz": gzip.compress}.items():
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(compress(GOOD) + compress(GOOD))
        tokenize(path, tmp_path / suffix, Options(str(corpus / "tokenizer")))
        assert len(documents(tmp_path / suffix)) == 4000


def test_inputs_that_are_links(two_files, corpus, tmp_path):
    """As in the cache of the Hugging Face hub."""
    blob = (two_files / "0.jsonl").rename(tmp_path / "0123456789abcdef")
    (two_files / "0.jsonl").symlink_to(blob)
    tokenize(two_files, tmp_path / "out", Options(str(corpus / "tokenizer")))
    assert len(list((tmp_path / "out").glob("*.ds"))) == 2


def test_inputs_by_url(two_files, corpus, tmp_path):
    for number, path in enumerate(["", "/*.jsonl", "/0.jsonl"]):
        folder = tmp_path / str(number)
        tokenize(f"file://{two_files}{path}", folder, Options(str(corpus / "tokenizer")))
        assert len(list(folder.glob("*.ds"))) == (1 if path == "/0.jsonl" else 2)


def test_nothing_to_read(corpus, tmp_path):
    options, out = Options(str(corpus / "tokenizer")), tmp_path / "out"
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.csv").touch()
    for name, said in {
        source: r"the folder has no file to read .*1 of another kind \(a\.csv\)",
        "none/train.jsonl": "no such file or folder",
        "s.jsonl": "no such file or folder",
        tmp_path / "*.jsonl": "the pattern matches nothing",
    }.items():
        with pytest.raises(TokenizationError, match=said):
            tokenize(name, out, options)
        assert not out.exists()
    write_jsonl(source / "a.jsonl", ["a"])
    pq.write_table(pa.table({"text": ["a"]}), source / "a.parquet")
    with pytest.raises(
        TokenizationError, match=r"must have either .*, but has 2 files \(1 \.jsonl, 1"
    ):
        tokenize(source, out, options)


@pytest.mark.parametrize(
    "error, why",
    [
        (OSError("no route"), "cannot reach it: OSError: no route"),
        (HFValidationError(), "not found"),
    ],
)
def test_a_name_that_is_not_on_the_hub(corpus, texts, tmp_path, monkeypatch, error, why):
    """A path that is not there looks like one; the right path is then accepted."""
    options, out = Options(str(corpus / "tokenizer")), tmp_path / "out"
    monkeypatch.setattr(tokenization_input, "dataset_info", mock.Mock(side_effect=error))
    monkeypatch.chdir(tmp_path)
    said = rf"data/train: neither a file or folder here nor a dataset on the .* hub \(.*{why}"
    with pytest.raises(TokenizationError, match=said):
        tokenize("data/train", out, options)
    tokenize(write_jsonl(tmp_path / "train.jsonl", texts), out, options)
    assert len(documents(out)) == len(texts)


def test_an_error_of_a_task_is_that_of_the_command(corpus, tmp_path, tst):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n{')
    result = tst("tokenize", source, tmp_path / "out", "--tokenizer", corpus / "tokenizer")
    assert result.code == 2
    assert f"error: {source}, record 1 (line 2): it is not valid JSON" in result.stderr


def test_other_settings_where_nothing_was_done(corpus, tmp_path):
    source, options = tmp_path / "a.jsonl", Options(str(corpus / "tokenizer"), text_key="a")
    source.write_text('{"a": "a", "b": "b"}\n{"b": "b"}\n')
    with pytest.raises(TokenizationError, match=r"record 1 \(line 2\): it has no field 'a'"):
        tokenize(source, tmp_path / "out", options)
    locks = tmp_path / "out" / "logs" / TOKENIZE / LOCKS
    other = dataclasses.replace(options, text_key="b")
    with (locks / "00000").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a worker that outlived its launch
        with pytest.raises(TokenizationError, match="has a corpus with text_key = 'a'"):
            tokenize(source, tmp_path / "out", other)
    tokenize(source, tmp_path / "out", other)
    assert len(documents(tmp_path / "out")) == 2
    with pytest.raises(TokenizationError, match="has a corpus with text_key = 'b'"):
        tokenize(source, tmp_path / "out", options)


def test_what_is_read_is_said(two_files, corpus, tmp_path, capsys):
    (two_files / "b.json").touch()
    tokenize(two_files, tmp_path / "out", Options(str(corpus / "tokenizer")))
    said = capsys.readouterr()
    assert "Reading 2 files (2 .jsonl)" in said.out
    assert "1 skipped: 1 of another kind (b.json)" in said.err


def test_a_folder_that_holds_something_else(texts, corpus, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(TokenizationError, match=r"is not empty and has no corpus\.json"):
        tokenize(tmp_path / "a.jsonl", tmp_path, Options(str(corpus / "tokenizer")))


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(TokenizationError, match=r"tokenizer = '/none': no such folder"):
        tokenize(tmp_path, tmp_path / "out", Options("/none"))
