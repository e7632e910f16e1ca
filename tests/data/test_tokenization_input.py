"""What is read, and what cannot be tokenized and says so."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import tokenize_corpus
from corpora import documents, tokenize, write_jsonl
from torchtitan.experiments.tst.data.shards import ShardError
from torchtitan.experiments.tst.data.tokenization import Options, TokenizationError

GOOD = b'{"text": "a"}\n' * 2000


PARQUET = pa.BufferOutputStream()


pq.write_table(pa.table({"text": ["a"] * 1000}), PARQUET)


PARQUET = PARQUET.getvalue().to_pybytes()


BAD_INPUTS = {  # name and content of a file beside good ones; what is said
    "no text": (b'{"text": "a"}\n{"content": "b"}\n', r"record 1: no text in its field 'text'"),
    "text is a number": (b'{"text": 1}\n', r"record 0: no text in its field 'text' .*'text': 1"),
    "a list": (b'["a"]\n', r"record 0: no text in its field 'text'"),
    "null": (b"null\n", r"record 0: no text in its field 'text'"),
    "a line cut off": (GOOD[:-5], r"record 1999: no JSON, unexpected end"),
    "bytes that are no UTF-8": (b'{"text": "\xff"}\n', r"record 0: no JSON, "),
    "an empty line": (GOOD + b"\n" + GOOD, r"record 2000: no JSON, "),
    "zst cut off": (zstandard.compress(GOOD)[:-9], r"cannot be read: OSError"),
    "zst cut off at the end of a line": (zstandard.compress(GOOD)[:-1], r"cannot be read: OSError"),
    "gz cut off": (gzip.compress(GOOD)[:-9], r"cannot be read: OSError\('Truncated compressed"),
    "gz that is none": (GOOD, r"cannot be read: OSError"),
    "parquet cut off": (PARQUET[:-9], r"cannot be read: ArrowInvalid"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_damaged_input_ends_the_work_with_its_name(corpus, tmp_path, kind):
    content, said = BAD_INPUTS[kind]
    suffix = {"zst": ".jsonl.zst", "gz": ".jsonl.gz", "parquet": ".parquet"}
    path = tmp_path / f"bad{suffix.get(kind.split()[0], '.jsonl')}"
    path.write_bytes(content)
    with pytest.raises(TokenizationError, match=rf"^{path}(, | ){said}"):
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
    for name in (source, "none/train.jsonl", "s.jsonl"):
        with pytest.raises(TokenizationError, match=r"no such file, and no folder with \.jsonl"):
            tokenize(name, out, options)
    write_jsonl(source / "a.jsonl", ["a"])
    pq.write_table(pa.table({"text": ["a"]}), source / "a.parquet")
    with pytest.raises(TokenizationError, match=r"one of the two, and found 2 files"):
        tokenize(source, out, options)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ShardError, match="only empty ones"):
        tokenize(tmp_path / "empty.jsonl", out, options)


def test_an_error_of_a_task_is_that_of_the_command(corpus, tmp_path):
    source, options = tmp_path / "a.jsonl", Options(str(corpus / "tokenizer"))
    source.write_text("{")
    with pytest.raises(SystemExit, match=f"^error: {source}, record 0: no JSON"):
        tokenize_corpus.main(str(source), tmp_path / "out", options, tokenize_corpus.Machine())


def test_a_folder_that_holds_something_else(texts, corpus, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(TokenizationError, match=r"is not empty and has no corpus\.json"):
        tokenize(tmp_path / "a.jsonl", tmp_path, Options(str(corpus / "tokenizer")))


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(TokenizationError, match=r"tokenizer = '/none': no such folder"):
        tokenize(tmp_path, tmp_path / "out", Options("/none"))
