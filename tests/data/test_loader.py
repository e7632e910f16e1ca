"""The stream of data tokens, read through upstream's text dataset in windows of two lengths."""

import json
import pickle

import pytest
import torch
from datasets import load_dataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

from torchtitan.experiments.tst.data.loader import check_workers, set_seq_len

BATCH, LONG, SHORT = 2, 12, 5


class CharacterTokenizer:
    """A token is a code point; enough to tell tokens apart and to see where documents begin."""

    def encode(self, text, add_bos, add_eos):
        return [1, *map(ord, text), 2]


@pytest.fixture
def documents(tmp_path):
    """Documents of different lengths, no two characters of all of them alike."""
    lengths = torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    start, texts = 0x4E00, []
    for length in lengths:
        texts.append("".join(chr(start + i) for i in range(length)))
        start += length
    paths = []
    for shard in range(4):  # streaming datasets are split by file
        paths.append(tmp_path / f"{shard}.jsonl")
        lines = [json.dumps({"text": text}) + "\n" for text in texts[shard::4]]
        paths[-1].write_text("".join(lines))
    return paths


@pytest.fixture(params=["map-style", "streaming"])
def streaming(request):
    return request.param == "streaming"


@pytest.fixture
def make_loader(documents, monkeypatch, streaming):
    def load(path):
        files = [str(p) for p in documents]
        return load_dataset("json", data_files=files, split="train", streaming=streaming)

    monkeypatch.setitem(DATASETS, "numbered", DatasetConfig("", load, lambda s: s["text"]))

    def make(seq_len, num_workers=0, infinite=False):
        dataset = HuggingFaceTextDataset(
            "numbered", None, CharacterTokenizer(), seq_len, infinite=infinite
        )
        return ParallelAwareDataloader(
            dataset, dp_rank=0, dp_world_size=1, batch_size=BATCH, num_workers=num_workers
        )

    return make


def tokens(batches):
    """Token ids in the order of reading: each window's inputs and its last label."""
    return [
        token
        for inputs, labels in batches
        for row, label in zip(inputs["input"].tolist(), labels.tolist(), strict=True)
        for token in [*row, label[-1]]
    ]


def take(loader, n):
    iterator = iter(loader)
    return [next(iterator) for _ in range(n)]


@pytest.fixture
def stream(make_loader):
    """All tokens in order, from windows of one token and its label."""
    return tokens(list(make_loader(1)))


@pytest.mark.parametrize("long_batches", [0, 1, 3, 7])
def test_no_token_is_lost_or_repeated_at_the_boundary(make_loader, stream, long_batches):
    loader = make_loader(SHORT)
    set_seq_len(loader, LONG)
    batches = take(loader, long_batches)
    set_seq_len(loader, SHORT)
    batches += take(loader, 9)
    assert [x["input"].shape[1] for x, _ in batches] == [LONG] * long_batches + [SHORT] * 9
    read = tokens(batches)
    assert read == stream[: len(read)]


@pytest.mark.parametrize("stop", range(1, 9))
def test_nor_across_a_resume_on_either_side_of_it(make_loader, stream, stop):
    boundary, total = 4, 10
    batches, state = [], None
    for begin, end in [(0, stop), (stop, total)]:
        loader = make_loader(SHORT)
        if state is not None:
            loader.load_state_dict(pickle.loads(pickle.dumps(state)))
        for first, last, seq_len in [(0, boundary, LONG), (boundary, total, SHORT)]:
            if (n := min(last, end) - max(first, begin)) > 0:
                set_seq_len(loader, seq_len)
                batches += take(loader, n)
        state = loader.state_dict()
    read = tokens(batches)
    assert len(batches) == total
    assert read == stream[: len(read)]


@pytest.mark.parametrize("streaming", [False], indirect=True)
def test_upstream_repeats_map_style_data_in_every_worker(make_loader):
    """Why more than one worker is refused."""
    (first, _), (second, _) = take(make_loader(SHORT, num_workers=2), 2)
    assert torch.equal(first["input"], second["input"])


@pytest.mark.parametrize("streaming", [False], indirect=True)
def test_upstreams_state_holds_the_live_token_buffer(make_loader):
    """Why workers, whose state is pickled while they read on, are refused at a boundary."""
    dataset = make_loader(SHORT).dataset
    windows = iter(dataset)
    next(windows)
    state = dataset.state_dict()
    before = len(state["token_buffer"])
    dataset._token_buffer.extend([3, 4, 5])  # as reading on does
    assert len(state["token_buffer"]) == before + 3


def test_workers_that_would_repeat_data_are_refused(make_loader, streaming):
    check_workers(make_loader(SHORT, num_workers=1))
    two_workers = make_loader(SHORT, num_workers=2)
    if streaming:
        check_workers(two_workers)
    else:
        with pytest.raises(ValueError, match=r"num_workers = 2: must be at most 1"):
            check_workers(two_workers)


@pytest.mark.parametrize("streaming", [False], indirect=True)
def test_a_dataset_without_a_sequence_length(make_loader):
    loader = make_loader(SHORT)
    del loader.dataset.seq_len
    with pytest.raises(TypeError, match="HuggingFaceTextDataset has no seq_len"):
        set_seq_len(loader, LONG)
