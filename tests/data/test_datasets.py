"""Text datasets that stream: the forms they read, and their names on the hub."""

import dataclasses
import gzip
import itertools
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, load_dataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

from corpora import DCLM, FINEWEB_EDU, write_jsonl
from jobs import validation
from torchtitan.experiments.tst.checks.agreement import contradictions, run_facts
from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.core import Schedule
from torchtitan.experiments.tst.data.build import (
    announce_text,
    build_dataloader,
    build_validation_dataloader,
)
from torchtitan.experiments.tst.data.errors import DataError
from torchtitan.experiments.tst.data.text import datasets
from torchtitan.experiments.tst.data.text.dataset import TextDataset
from torchtitan.experiments.tst.errors import ConfigError

TEXTS = [f"document {number} of the corpus" for number in range(12)]
OPENERS = {"jsonl": open, "json.gz": gzip.open, "jsonl.zst": zstandard.open}


class Words:
    """Tokens are the numbers in a text; of one without any, its characters."""

    def encode(self, text, add_bos, add_eos):
        numbers = [int(word) for word in text.split() if word.isdigit()]
        return numbers or [1, *map(ord, text), 2]


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


@pytest.mark.parametrize("dataset", ["jsonl", "parquet", "dclm", "fineweb_edu"])
def test_a_folder_without_such_files_is_refused(make_config, tmp_path, dataset):
    (tmp_path / "a.csv").touch()
    config = make_config(f"--training.dataset={dataset}", f"--training.dataset_path={tmp_path}")
    with pytest.raises(
        ConfigError, match=r"training\.dataset_path = .*no file to read.*\(a\.csv\)"
    ):
        check_job(config)


@pytest.mark.parametrize("section", ["training", "validation"])
@pytest.mark.parametrize("content", ["", "\n \n", '{"text": ""}\n'])
def test_data_without_a_document_are_refused(make_config, corpus, tmp_path, section, content):
    (tmp_path / "a.jsonl").write_text(content)
    path = tmp_path / "a.jsonl"
    on = validation(corpus) if section == "validation" else ()
    config = make_config(*on, f"--{section}.dataset_path={path}")
    with pytest.raises(
        ConfigError, match=rf"^{section}\.dataset_path = .*1 file .* of {len(content)} b"
    ):
        check_job(config)


@pytest.mark.parametrize("section", ["training", "validation"])
def test_a_dataset_of_upstreams_that_cannot_be_opened(make_config, tmp_path, section):
    (tmp_path / "a.jsonl").touch()
    key = f"{section}.dataset"
    config = make_config(f"--{key}=c4_test", f"--{key}_path={tmp_path}")
    build = {"training": build_dataloader, "validation": build_validation_dataloader}[section]
    with pytest.raises(
        DataError, match=rf"^{key} = 'c4_test' \({key}_path = '{tmp_path}'\) cannot"
    ):
        build(1, 0, Words(), config)


def test_a_pass_without_a_document_ends(make_config, tmp_path):
    """Where upstream begins anew for ever: one of two ranks, or of two workers, has none."""
    (tmp_path / "0.jsonl").write_text('{"text": "a text"}\n')
    (tmp_path / "1.jsonl").write_text("\n")
    args = (f"--training.dataset_path={tmp_path}", "--training.seq_len=4")
    config = make_config(*args)
    next(iter(build_dataloader(2, 0, Words(), config)))
    with pytest.raises(DataError, match=r"training\.dataset_path = .*part 2 of 2 has no document"):
        next(iter(build_dataloader(2, 1, Words(), config)))
    batches = iter(
        build_dataloader(1, 0, Words(), make_config(*args, "--training.dataloader.num_workers=2"))
    )
    with pytest.raises(DataError, match="worker 2 of 2, has no document"):
        list(itertools.islice(batches, 2))
    config.validation = dataclasses.replace(
        config.validation, dataset="jsonl", dataset_path=str(tmp_path)
    )
    with pytest.raises(
        DataError, match=r"validation\.dataset_path = .*part 2 of 2 has no document"
    ):
        next(iter(build_validation_dataloader(2, 1, Words(), config)))


def test_documents_without_a_token_end(make_config, tmp_path):
    class Nothing:
        def encode(self, text, add_bos, add_eos):
            return []

    config = make_config(f"--training.dataset_path={write_jsonl(tmp_path / 'a.jsonl', ['a'])}")
    with pytest.raises(DataError, match="it has no document"):
        next(iter(build_dataloader(1, 0, Nothing(), config)))


def test_a_position_at_the_very_end_is_resumed(make_config, tmp_path):
    config = make_config(f"--training.dataset_path={write_jsonl(tmp_path / 'a.jsonl', ['a'])}")
    config.training.seq_len = 2
    dataset = TextDataset("training", 0, 1, Words(), config, infinite=True)
    windows = iter(dataset)
    next(windows)
    resumed = TextDataset("training", 0, 1, Words(), config, infinite=True)
    resumed.load_state_dict(pickle.loads(pickle.dumps(dataset.state_dict())))
    assert next(iter(resumed))[1].tolist() == next(windows)[1].tolist()


def test_another_text_key(make_config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "1 2", "content": "3 4 5"}\n')
    pq.write_table(pa.table({"content": ["3 4 5"], "text": [1]}), tmp_path / "a.parquet")
    for dataset in ("jsonl", "parquet"):
        config = make_config(
            f"--training.dataset={dataset}",
            f"--training.dataset_path={tmp_path}",
            "--training.seq_len=2",
            "--text_dataset.text_key=content",
        )
        check_job(config)
        inputs, _ = next(iter(build_dataloader(1, 0, Words(), config)))
        assert inputs["input"].tolist()[0] == [3, 4]
        assert DATASETS[dataset] is datasets.OURS[dataset]


@pytest.mark.parametrize(
    "args",
    [
        ["--training.dataset=c4"],
        ["--training.dataset=own"],
        ["--training.dataset=token_shards"],
        ["--validation.enable", "--validation.dataset=c4", "--validation.seq_len=32"],
    ],
)
def test_a_text_key_that_nothing_reads(make_config, monkeypatch, args):
    monkeypatch.setitem(DATASETS, "own", DatasetConfig("", print, print))
    config = make_config("--text_dataset.text_key=content", *args)
    with pytest.raises(
        ConfigError, match=r"text_dataset\.text_key = 'content': needs a text dataset"
    ):
        check_job(config)


def test_another_text_key_contradicts_the_checkpoint(make_config):
    def facts(*args):
        return run_facts(make_config(*args), Schedule(), None, None, 1)

    key = "text_dataset.text_key"
    earlier, other = {"run": facts(), "step": 1}, facts("--text_dataset.text_key=content")
    assert contradictions(earlier, facts(), []) == []
    assert contradictions(earlier, other, []) == [
        f"{key} = 'content', but 'text' in the checkpoint"
    ]
    assert contradictions(earlier, other, ["dataloader"]) == []
    del earlier["run"][key]  # as of an earlier version
    assert contradictions(earlier, other, []) == []
    assert key not in facts("--training.dataset=c4")


def test_other_files_contradict_the_checkpoint(make_config, tmp_path):
    """A position counts documents of the files that there were."""

    def facts():
        config = make_config(f"--training.dataset_path={tmp_path}")
        return run_facts(config, Schedule(), None, None, 1)

    for number in (1, 2):
        write_jsonl(tmp_path / f"{number}.jsonl", ["a"])
    earlier = {"run": facts(), "step": 1}
    (tmp_path / "0.csv").touch()
    assert contradictions(earlier, facts(), []) == []
    write_jsonl(tmp_path / "0.jsonl", ["a"])
    (found,) = contradictions(earlier, facts(), [])
    assert found.startswith("training.dataset_path = 'text files with checksum ")
    assert contradictions(earlier, facts(), ["dataloader"]) == []


def test_an_own_dataset_of_that_name_is_left_alone(make_config, monkeypatch):
    own = DatasetConfig("", lambda path: Dataset.from_dict({"x": ["7 8 9"]}), lambda s: s["x"])
    monkeypatch.setitem(DATASETS, "jsonl", own)
    config = make_config("--training.seq_len=2")
    inputs, _ = next(iter(build_dataloader(1, 0, Words(), config)))
    assert inputs["input"].tolist()[0] == [7, 8]
    assert DATASETS["jsonl"] is own


def test_a_position_that_counts_lines_is_refused(make_config, tmp_path, monkeypatch):
    """Of a checkpoint from before records were read by this package."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def load(path):
        return load_dataset("text", data_files=[path], split="train", streaming=True)

    with monkeypatch.context() as patch:
        patch.setitem(DATASETS, "jsonl", DatasetConfig("", load, lambda s: s["text"]))
        earlier = ParallelAwareDataloader(open_text(("jsonl", path)), 0, 1, batch_size=1)
        next(iter(earlier))
    loader = build_dataloader(1, 0, Words(), make_config(f"--training.dataset_path={path}"))
    with pytest.raises(ValueError, match=r'exclude_from_loading = \["dataloader"\]'):
        loader.load_state_dict(earlier.state_dict())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_record_without_text_ends_training_with_its_name(make_config, tmp_path, workers):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "1 2"}\n\n{"text": null}\n')
    config = make_config(
        f"--training.dataset_path={tmp_path}",
        f"--training.dataloader.num_workers={workers}",
        "--training.seq_len=1",
        "--training.local_batch_size=1",
    )
    error = (
        rf"training\.dataset = 'jsonl'.*{tmp_path}/a\.jsonl, record 1 \(line 3\): its field 'text'"
    )
    with pytest.raises(DataError, match=error):
        list(build_dataloader(1, 0, Words(), config))


def test_the_files_are_announced(make_config, tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    for name in ("b.json", "c.csv", ".d.jsonl"):
        (tmp_path / name).touch()
    loader = build_dataloader(1, 0, Words(), make_config(f"--training.dataset_path={tmp_path}"))
    caplog.set_level("INFO")
    announce_text("training", loader)
    assert "Data: training reads 1 file (1 .jsonl)" in caplog.text
    skipped = "3 skipped: 1 hidden (.d.jsonl); 2 of another kind (b.json, c.csv)"
    assert skipped in caplog.text
