"""The data tokens of every step: at a boundary, and on other machines than the run began on."""

import copy
import functools
import itertools
import json
import pickle

import pytest
import torch
from datasets import load_dataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

from torchtitan.experiments.tst.data.build import build_dataloader
from torchtitan.experiments.tst.data.errors import DataError
from torchtitan.experiments.tst.data.text.streams import StreamsDataloader

GLOBAL_BATCH, S, BOUNDARY, L, STEPS = 12, 3, 3, 6, 6
IN_STAGES = ("--superposition.bag_size=4,2,3", "--superposition.steps=1,2,1")


class CharacterTokenizer:
    """A token is a code point; enough to tell tokens apart and to see where documents begin."""

    def encode(self, text, add_bos, add_eos):
        return [1, *map(ord, text), 2]


@pytest.fixture
def documents(tmp_path):
    """Documents of different lengths, no two characters of all of them alike."""
    lengths = torch.randint(1, 60, (96,), generator=torch.Generator().manual_seed(0)).tolist()
    start, texts = 0x4E00, []
    for length in lengths:
        texts.append("".join(chr(start + i) for i in range(length)))
        start += length
    paths = []
    for shard in range(12):  # streaming datasets are split by file
        paths.append(tmp_path / f"{shard}.jsonl")
        lines = [json.dumps({"text": text}) + "\n" for text in texts[shard::12]]
        paths[-1].write_text("".join(lines))
    return paths


@pytest.fixture(params=["map-style", "streaming"])
def streaming(request):
    return request.param == "streaming"


@pytest.fixture
def dataset(documents, monkeypatch, streaming):
    files = [str(p) for p in documents]
    loaded = functools.cache(load_dataset)

    def load(path):  # each time another object of the same files
        dataset = loaded("json", data_files=tuple(files), split="train", streaming=streaming)
        return copy.deepcopy(dataset) if streaming else copy.copy(dataset)

    monkeypatch.setitem(DATASETS, "numbered", DatasetConfig("", load, lambda s: s["text"]))


@pytest.fixture
def loaders(dataset, make_config):
    """The loaders of all ranks of a launch."""

    def make(ranks, *args, local_batch_size=1, workers=0):
        config = make_config(
            "--training.dataset=numbered",
            f"--training.seq_len={L}",
            f"--training.global_batch_size={GLOBAL_BATCH}",
            f"--training.local_batch_size={local_batch_size}",
            f"--training.dataloader.num_workers={workers}",
            f"--superposition.bag_size={S}",
            f"--superposition.steps={BOUNDARY}",
            *args,
        )
        return [
            build_dataloader(ranks, rank, CharacterTokenizer(), config) for rank in range(ranks)
        ]

    return make


def save(loaders):
    """What the ranks together put into a checkpoint."""
    states = {}
    for loader in loaders:
        states |= loader.state_dict()
    return states


def load(loaders, states):
    for loader in loaders:
        loader.set_streams(states["world_size"])
        wanted = {key: states[key] for key in loader.state_dict()}
        loader.load_state_dict(wanted)


def read(loaders, first_step, last_step):
    """Each step's windows on all ranks, in order: lists of token ids."""
    for loader in loaders:
        loader.begin(first_step - 1)
    iterators = [iter(loader) for loader in loaders]
    steps = []
    for step in range(first_step, last_step + 1):
        scale = loaders[0].dataset.schedule.batch_shape(step, 1, L).sequences
        share, windows = GLOBAL_BATCH * scale // len(loaders), []
        for iterator in iterators:
            mine = []
            while len(mine) < share:
                inputs, labels = next(iterator)
                assert torch.equal(inputs["input"][:, 1:], labels[:, :-1])
                mine += torch.cat([inputs["input"], labels[:, -1:]], 1).tolist()
            windows += mine
        steps.append(windows)
    return steps


@pytest.mark.parametrize(
    ("args", "lengths"),
    [
        (("scale=sequence",), [S * L] * BOUNDARY + [L] * (STEPS - BOUNDARY)),
        (("scale=batch", "bag_size=6,2", "steps=1,2"), [L] * STEPS),
        (("mode=output",), [L] * STEPS),
        (("bag_size=4,2,3", "steps=1,2,1"), [4 * L, 2 * L, 2 * L, 3 * L, L, L]),
    ],
    ids=["sequence", "batch", "output", "stages"],
)
def test_each_stream_is_what_upstreams_rank_reads(loaders, args, lengths):
    args = [f"--superposition.{argument}" for argument in args]
    steps = read(loaders(3, *args, local_batch_size=2), 1, STEPS)
    for rank in range(3):
        upstream = HuggingFaceTextDataset("numbered", None, CharacterTokenizer(), 1, rank, 3)
        stream = [t for inputs, labels in upstream for t in (*inputs["input"].tolist(), labels[-1])]
        mine = []
        for windows in steps:
            share = len(windows) // 3
            mine += itertools.chain(*windows[rank * share : (rank + 1) * share])
        assert mine == stream[: len(mine)]
    assert [{len(window) - 1 for window in windows} for windows in steps] == [
        {length} for length in lengths
    ]


@pytest.mark.parametrize(
    "launches",
    [
        [(2, 2), (4, 4), (1, 6)],
        [(2, 3), (4, 6)],
        [(3, 2), (2, 3), (12, 6)],
    ],
    ids=lambda launches: " -> ".join(f"{ranks} until {last}" for ranks, last in launches),
)
@pytest.mark.parametrize("stages", [(), IN_STAGES], ids=["one stage", "stages"])
def test_any_number_of_ranks_goes_on_with_the_same_steps(loaders, launches, stages):
    began_with = launches[0][0]
    undisturbed = read(loaders(began_with, *stages), 1, STEPS)
    steps, states = [], None
    for ranks, last in launches:
        of_launch = loaders(ranks, *stages)
        if states:
            load(of_launch, states)
        steps += read(of_launch, len(steps) + 1, last)
        states = pickle.loads(pickle.dumps(save(of_launch)))
    assert steps == undisturbed


@pytest.mark.parametrize("stages", [(), IN_STAGES], ids=["one stage", "stages"])
@pytest.mark.parametrize("stop", [1, 2, BOUNDARY, 4])
def test_any_number_of_workers_goes_on_with_the_same_steps(loaders, stages, stop):
    undisturbed = read(loaders(1, *stages), 1, STEPS)
    for before, after in [(0, 1), (1, 0), (1, 1)]:
        first = loaders(1, *stages, workers=before, local_batch_size=4)
        steps = read(first, 1, stop)
        second = loaders(1, *stages, workers=after, local_batch_size=2)
        load(second, save(first))
        steps += read(second, stop + 1, STEPS)
        assert steps == undisturbed


@pytest.mark.parametrize("ranks", [1, 3])
def test_upstream_goes_on_from_the_state_and_back(loaders, dataset, ranks):
    undisturbed = read(loaders(ranks), 1, STEPS)
    mine = loaders(ranks)
    steps = read(mine, 1, 4)
    states = save(mine)
    per_rank, windows = GLOBAL_BATCH // ranks, []
    for rank in range(ranks):
        hf = HuggingFaceTextDataset("numbered", None, CharacterTokenizer(), L, rank, ranks)
        upstream = ParallelAwareDataloader(hf, rank, ranks, batch_size=1)
        upstream.load_state_dict(states)
        for inputs, labels in itertools.islice(upstream, per_rank):
            windows.append([*inputs["input"][0].tolist(), labels[0, -1].item()])
        states |= upstream.state_dict()
    steps.append(windows)
    mine = loaders(ranks)
    load(mine, states)
    steps += read(mine, 6, STEPS)
    assert steps == undisturbed


@pytest.mark.parametrize("streaming", ["streaming"], indirect=True)
@pytest.mark.parametrize("stop", [4, 7, 9])
def test_resuming_in_a_later_epoch(loaders, documents, stop):
    """The positions of a streaming dataset count in their epoch only."""
    for path in documents:  # about one step's tokens in all
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    undisturbed = read(loaders(1), 1, 10)
    mine = loaders(1)
    steps = read(mine, 1, stop)
    assert json.loads(mine[0]._state)["0"]["data"]["epoch"] > 0
    states = save(mine)
    mine = loaders(1)
    load(mine, states)
    assert steps + read(mine, stop + 1, 10) == undisturbed


@pytest.mark.parametrize("streaming", ["streaming"], indirect=True)
def test_a_shuffle_buffer_is_warned_of(loaders, documents, monkeypatch, caplog):
    def load_shuffled(path):
        files = [str(p) for p in documents]
        dataset = load_dataset("json", data_files=files, split="train", streaming=True)
        return dataset.shuffle(buffer_size=10, seed=0)

    config = DatasetConfig("", load_shuffled, lambda s: s["text"])
    monkeypatch.setitem(DATASETS, "numbered", config)
    loaders(1)
    assert "has a shuffle buffer" in caplog.text


def test_state_before_anything_is_read(loaders):
    """As a stop during a launch's first moments saves it."""
    undisturbed = read(loaders(2), 1, STEPS)
    first = loaders(2)
    steps = read(first, 1, 2)
    second = loaders(2)
    load(second, save(first))
    third = loaders(2)
    load(third, save(second))
    assert steps + read(third, 3, STEPS) == undisturbed
    fresh = loaders(2)
    load(fresh, save(loaders(2)))
    assert read(fresh, 1, STEPS) == undisturbed


@pytest.mark.parametrize("streaming", ["map-style"], indirect=True)
def test_a_position_cannot_run_code(loaders):
    (loader,) = loaders(1)
    with pytest.raises(ValueError, match=r"refused to load .*\.system"):
        loader.load_state_dict({"dp_rank_0": pickle.dumps(Command()), "world_size": 1})


class Command:
    def __reduce__(self):
        import os

        return os.system, ("true",)


@pytest.mark.parametrize("streaming", ["streaming"], indirect=True)
def test_a_position_of_upstreams_workers_is_refused(loaders, dataset):
    hf = HuggingFaceTextDataset("numbered", None, CharacterTokenizer(), L)
    upstream = ParallelAwareDataloader(hf, 0, 1, batch_size=1, num_workers=2)
    next(iter(upstream))
    (loader,) = loaders(1)
    with pytest.raises(ValueError, match="without worker processes"):
        loader.load_state_dict(upstream.state_dict())


@pytest.mark.parametrize("streaming", ["map-style"], indirect=True)
def test_what_cannot_be_shared_out(loaders):
    (loader,) = loaders(1)
    with pytest.raises(ValueError, match=r"global_batch_size = 12: must be a multiple of 5"):
        loader.set_streams(5)
    config = loader.dataset.job_config
    config.training.global_batch_size = 120
    with pytest.raises(DataError, match="fewer documents than the 120 data-parallel ranks"):
        build_dataloader(120, 119, CharacterTokenizer(), config)


@pytest.mark.parametrize("streaming", ["map-style"], indirect=True)
def test_upstream_repeats_map_style_data_in_every_worker(dataset):
    """Why more than one worker is refused."""
    hf = HuggingFaceTextDataset("numbered", None, CharacterTokenizer(), L)
    iterator = iter(ParallelAwareDataloader(hf, 0, 1, batch_size=1, num_workers=2))
    assert torch.equal(next(iterator)[0]["input"], next(iterator)[0]["input"])


def test_workers_that_would_repeat_data_are_refused(loaders, streaming):
    off = "--superposition.bag_size=1"
    assert isinstance(loaders(1, off, workers=1)[0], StreamsDataloader)
    if streaming:  # upstream's own loader, which shares the data out to them
        assert isinstance(loaders(1, off, workers=2)[0], ParallelAwareDataloader)
    else:
        with pytest.raises(ValueError, match=r"num_workers = 2: must be at most 1"):
            loaders(1, off, workers=2)
