"""Fixtures: texts of the small corpus and some odd ones, also as two files."""

import json

import pytest

from corpora import write_jsonl


@pytest.fixture(scope="session")
def texts(corpus):
    lines = (corpus / "train.jsonl").read_text().splitlines()[:200]
    extra = ["naïve café\n\n\t你好 🙂", "<|begin_of_text|>as text<|end_of_text|>", " ", "x"]
    return [json.loads(line)["text"] for line in lines] + extra


@pytest.fixture
def two_files(texts, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write_jsonl(folder / "0.jsonl", texts[:90])
    write_jsonl(folder / "1.jsonl", texts[90:])
    return folder
