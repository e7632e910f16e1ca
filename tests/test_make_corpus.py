"""scripts/make_corpus.py: the corpora of the replication."""

import gzip
import json

import pytest
from tokenizers import Tokenizer

import make_corpus
from torchtitan.experiments.tst.data.errors import DataError

PAGE = """
                        Notes on Bags of Tokens                 May 2026

1.  Introduction

   A bag has several tokens, and the model sees the mean of their
   embeddings.  This paragraph goes on over the end of the page,

Somebody                     Informational                      [Page 1]
\x0c
RFC 9999                Notes on Bags of Tokens                 May 2026


   where it ends with a full stop as sentences do.

   +-----+-----+
   | bag | 1.0 |
   +-----+-----+

   o  A list has another indent in its second line, which this one has,
      too.

   bag = 1*4token ; 0x00-0xFF, %d12.34.56.78
   end = %d13.10  ; 0x0D0A, %d13.10.13.10.13.

   This one is in every document of the series, so it is only read
   once.
"""
JOINED = (
    "A bag has several tokens, and the model sees the mean of their embeddings. This paragraph "
    "goes on over the end of the page, where it ends with a full stop as sentences do."
)
COMMON = "This one is in every document of the series, so it is only read once."


def test_prose_of_an_rfc():
    assert list(make_corpus.prose(PAGE)) == [JOINED, COMMON]


def test_rfcs_are_read_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "rfc9999.txt").write_text(PAGE)
    (tmp_path / "rfc9998.txt.gz").write_bytes(
        gzip.compress(PAGE.replace("A bag", "The bag").encode())
    )
    (tmp_path / "sub" / "rfc9999.txt").symlink_to(tmp_path / "rfc9999.txt")
    for name in ("rfc-index.txt", "rfc1.txt.orig", "rfc2-notes.txt", "rfcs.txt"):
        (tmp_path / name).write_text(PAGE.replace("A bag", "No bag"))
    of_9998 = JOINED.replace("A bag", "The bag")
    assert list(make_corpus.read_rfcs(tmp_path)) == [f"{of_9998}\n{COMMON}\n", f"{JOINED}\n"]


def test_no_rfc(tmp_path):
    with pytest.raises(DataError, match=r"has no file rfcNUMBER\.txt"):
        list(make_corpus.read_rfcs(tmp_path))


def test_python_sources_are_read_once(tmp_path):
    files = {"a/one.py": b"x = 1\n", "a/two.py": b"x = 1\n", "b/three.py": b"x = 3\n"}
    files |= {"b/empty.py": b"", "b/latin.py": b"x = '\xe4'\n", "b/data.txt": b"x = 4\n"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "b"]
    assert list(make_corpus.read_python(folders)) == ["x = 1\n", "x = 3\n"]
    library, packages, _ = make_corpus.python_folders()
    assert (library / "collections" / "__init__.py").exists()
    assert (packages / "torch" / "__init__.py").exists()


def test_a_corpus(tmp_path, run_script):
    for number in range(40):
        text = PAGE.replace("A bag", f"Bag {'of many words ' * 40}number {number}")
        (tmp_path / f"rfc{number}.txt").write_text(text)
    folder = tmp_path / "corpus"
    made = run_script("make_corpus", "rfc", folder, "--source", tmp_path, "--vocab-size", 300)
    assert made.code == 0, made.stderr
    train, validation = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    )
    numbers = [{p["text"].rpartition("number ")[2] for p in part} for part in (train, validation)]
    assert len(train) + len(validation) == 41  # one has a piece of the paragraph that all have
    assert not numbers[0] & numbers[1]
    assert 2 <= len(validation) <= 3
    assert Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).get_vocab_size() == 300
    tokens = json.loads((folder / "tokens" / "corpus.json").read_text())
    assert tokens["complete"]
    assert tokens["documents"] == len(train)

    again = ("rfc", folder, "--source", tmp_path, "--vocab-size")
    assert run_script("make_corpus", *again, 300).code == 0
    other = run_script("make_corpus", *again, 301)
    assert other.code == 2
    assert "'vocab_size': 300}, not {'kind': 'rfc', 'vocab_size': 301}" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["rfc"], "--source is missing: give the folder with the RFCs"),
        (["python", "--source", "."], "--source .: only rfc has a source. Remove the option"),
        (["python", "--vocab-size", "257"], "--vocab-size 257: must be at least 258"),
        (["rfc", "--source", "one"], "needs at least 2 source files, found 1"),
    ],
)
def test_no_corpus(run_script, tmp_path, monkeypatch, arguments, error):
    one = tmp_path / "one"
    one.mkdir()
    (one / "rfc1.txt").write_text(PAGE)
    kind, *rest = (one if argument == "one" else argument for argument in arguments)
    made = run_script("make_corpus", kind, tmp_path / "corpus", *rest)
    assert made.code == 2
    assert error in made.stderr
    assert not (tmp_path / "corpus").exists()


def test_a_folder_with_something_else(run_script, tmp_path):
    made = run_script("make_corpus", "python", tmp_path)
    assert made.code == 2
    assert f"{tmp_path} holds no corpus of this script" in made.stderr
