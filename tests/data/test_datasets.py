"""Text datasets that stream: the forms they read, and their names on the hub."""

import gzip
import itertools
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

from corpora import DCLM, FINEWEB_EDU
from torchtitan.experiments.tst.data.datasets import JSONL, data_files
from torchtitan.experiments.tst.job_checks import check_job
from torchtitan.experiments.tst.job_config import ConfigError

TEXTS = [f"document {number} of the corpus" for number in range(12)]
OPENERS = {"jsonl": open, "json.gz": gzip.open, "jsonl.zst": zstandard.open}


class Words:
    """Tokens are the numbers in a text."""

    def encode(self, text, add_bos, add_eos):
        return [int(word) for word in text.split() if word.isdigit()]


def write(path, suffix, texts, record):
    if suffix == "parquet":
        rows = [record | {"text": text} for text in texts]
        pq.write_table(pa.Table.from_pylist(rows), f"{path}.{suffix}")
    else:
        with OPENERS[suffix](f"{path}.{suffix}", "wt") as file:
            file.writelines(json.dumps(record | {"text": text}) + "\n" for text in texts)


FORMS = {  # dataset: suffix, records of the first file, of the later ones
    "jsonl": ("jsonl", {}, {"id": 1}),
    "dclm": ("jsonl.zst", DCLM, DCLM | {"metadata": {"WARC-Truncated": "length", "new": 1}}),
    "parquet": ("parquet", {}, {}),
    "fineweb_edu": ("parquet", FINEWEB_EDU, FINEWEB_EDU | {"date": "2013-05-18T05:48:54Z"}),
    "fineweb_edu_10bt": ("parquet", FINEWEB_EDU, FINEWEB_EDU),
    "jsonl of c4": (
        "json.gz",
        {"url": "x", "timestamp": "2019"},
        {"url": "y", "timestamp": "2020"},
    ),
}


@pytest.fixture(params=FORMS)
def dataset(request, tmp_path):
    """Of four files: name and folder."""
    suffix, *records = FORMS[request.param]
    for number in range(4):
        folder = tmp_path / f"part-{number % 2}"
        folder.mkdir(exist_ok=True)
        write(folder / str(number), suffix, TEXTS[3 * number : 3 * number + 3], records[number > 0])
    return request.param.split()[0], tmp_path


def open_text(dataset, rank=0, ranks=1):
    name, path = dataset
    return HuggingFaceTextDataset(name, str(path), Words(), 2, rank, ranks, infinite=False)


def tokens(windows):
    return [
        token
        for inputs, labels in windows
        for token in [*inputs["input"].tolist(), int(labels[-1])]
    ]


def test_text_of_each_form(dataset):
    read = tokens(open_text(dataset))
    assert sorted(read) == list(range(12))
    assert read[:3] == [0, 1, 2], "the files in the order of their names"


def test_ranks_share_the_files(dataset):
    parts = [tokens(open_text(dataset, rank, 2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(12))


def test_position_is_resumed(dataset):
    whole = list(open_text(dataset))
    stream = open_text(dataset)
    first = list(itertools.islice(stream, 2))
    state = pickle.loads(pickle.dumps(stream.state_dict()))
    resumed = open_text(dataset)
    resumed.load_state_dict(state)
    assert tokens(first) + tokens(resumed) == tokens(whole)


def test_names_on_the_hub():
    """As on the dataset cards; c4 is upstream's own."""
    dclm, fineweb_edu = "mlfoundations/dclm-baseline-1.0", "HuggingFaceFW/fineweb-edu"
    expected = {
        "dclm": f"{dclm}/global-shard_*/local-shard_*/*.jsonl.zst",
        "fineweb_edu": f"{fineweb_edu}/data/*/*.parquet",
        "fineweb_edu_10bt": f"{fineweb_edu}/sample/10BT/*.parquet",
        "fineweb_edu_100bt": f"{fineweb_edu}/sample/100BT/*.parquet",
        "fineweb_edu_350bt": f"{fineweb_edu}/sample/350BT/*.parquet",
    }
    for name, path in expected.items():
        assert DATASETS[name].path == f"hf://datasets/{path}"
    assert DATASETS["c4"].path == "allenai/c4"


def test_files_that_a_path_stands_for(tmp_path):
    for name in ("b/2.jsonl", "a.jsonl.zst", "[c].json.gz", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(path):
        return [file.removeprefix(f"{tmp_path}/") for file in data_files(str(path), JSONL)]

    assert names(tmp_path) == ["[c].json.gz", "a.jsonl.zst", "b/2.jsonl"]
    assert names(tmp_path / "d.txt") == ["d.txt"]
    assert names(tmp_path / "[c].json.gz") == ["[c].json.gz"]
    assert names(tmp_path / "*" / "*.jsonl") == ["b/2.jsonl"]
    assert data_files("s3://bucket/*.jsonl", JSONL) == ["s3://bucket/*.jsonl"]


@pytest.mark.parametrize("dataset", ["jsonl", "parquet", "dclm", "fineweb_edu"])
def test_a_folder_without_such_files_is_refused(make_config, tmp_path, dataset):
    (tmp_path / "a.csv").touch()
    config = make_config(f"--training.dataset={dataset}", f"--training.dataset_path={tmp_path}")
    with pytest.raises(ConfigError, match=r"training\.dataset_path = .*no folder with \."):
        check_job(config)


@pytest.mark.parametrize("line", ["", "{", '["a"]', '{"content": "a"}', '{"text": null}'])
def test_a_line_without_text_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "1 2"}}\n{line}\n')
    with pytest.raises(ValueError, match="field `text`"):
        list(open_text(("jsonl", tmp_path)))
