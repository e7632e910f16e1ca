"""The tokens of every step from token shards: whatever the ranks, workers, phases and resumes."""

import itertools
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from corpora import write_shards
from jobs import SAVE_LAST, losses, saving, superposition
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.data.build import build_dataloader, build_validation_dataloader
from torchtitan.experiments.tst.data.loader import DataError
from torchtitan.experiments.tst.data.shards.loader import ShardsDataloader, tokens_to_read
from torchtitan.experiments.tst.metrics_file import VALIDATION_LOSS
from torchtitan.experiments.tst.resilience.checkpoint.inventory import complete_steps
from torchtitan.experiments.tst.resilience.checkpoint.manifests import CheckpointError

L, GLOBAL_BATCH, STEPS = 6, 8, 7


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three folders; no token is in two of them."""
    folder = tmp_path_factory.mktemp("sources")
    for number, sizes in enumerate([(700, 500), (300,), (40, 0, 60)]):
        first = 1 + 20_000 * number
        shards = []
        for size in sizes:
            shards.append([list(range(first, first + size))])
            first += size
        write_shards(folder / str(number), shards)
    return folder


@pytest.fixture(scope="module")
def make_loaders(sources, base_args, tmp_path_factory):
    """The loaders of all ranks of a launch."""
    run_folder = tmp_path_factory.mktemp("run")

    def make(ranks, *args, paths="0,1,2", local_batch_size=1):
        config = SuperpositionConfigManager().parse_args(
            [
                *base_args,
                f"--job.dump_folder={run_folder}",
                "--training.dataset=token_shards",
                "--training.dataset_path=None",
                "--token_shards.paths",
                ",".join(str(sources / path) for path in paths.split(",")),
                f"--training.seq_len={L}",
                f"--training.steps={STEPS}",
                f"--training.global_batch_size={GLOBAL_BATCH}",
                f"--training.local_batch_size={local_batch_size}",
                *args,
            ]
        )
        return [build_dataloader(ranks, rank, None, config) for rank in range(ranks)]

    return make


def read(loaders, completed_steps=0):
    """Each further step's windows on all ranks, in order, and the state after it."""
    for loader in loaders:
        loader.begin(completed_steps)
    iterators = [iter(loader) for loader in loaders]
    training, schedule = loaders[0].job_config.training, loaders[0].reader.schedule
    for step in itertools.count(completed_steps + 1):
        shape = schedule.batch_shape(step, training.local_batch_size, training.seq_len)
        windows = []
        for loader, iterator in zip(loaders, iterators, strict=True):
            for _ in range(loader.reader.accumulation):
                try:
                    inputs, labels = next(iterator)
                except StopIteration:
                    return
                assert labels.shape == inputs["input"].shape == (shape.sequences, shape.data_tokens)
                assert inputs["input"].is_contiguous() and labels.is_contiguous()
                assert torch.equal(inputs["input"][:, 1:], labels[:, :-1])
                windows += torch.cat([inputs["input"], labels[:, -1:]], 1).tolist()
        states = [loader.state_dict() for loader in loaders]
        assert all(state == states[0] for state in states)
        yield windows, states[0]


def phases(bag_size, boundary, scale="sequence", mode="full"):
    return (
        f"--superposition.bag_size={bag_size}",
        f"--superposition.steps={boundary}",
        f"--superposition.scale={scale}",
        f"--superposition.mode={mode}",
    )


WAYS = ["sequence full", "sequence input", "batch full", "sequence output"]  # scale, mode


@st.composite
def stages(draw):
    """Arguments of any stages. They end before the last step."""
    scale, mode = draw(st.sampled_from(WAYS)).split()
    bag_sizes = st.sampled_from([2, 3, 6]) if scale == "batch" else st.integers(2, 4)
    ends = sorted(draw(st.lists(st.integers(0, STEPS - 1), max_size=4)))
    steps = [end - begin for begin, end in itertools.pairwise([0, *ends])]
    sizes = [draw(bag_sizes) for _ in steps]
    in_list = (",".join(map(str, numbers)) for numbers in (sizes, steps))
    return phases(*in_list, scale, mode) if steps else ()


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=set(Phase) - {Phase.shrink},  # which would take minutes where it fails
)
@given(
    stages(),
    st.sampled_from(["0", "0,1", "0,1,2"]),
    st.lists(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)]), min_size=1),
    st.lists(st.integers(1, STEPS - 1), max_size=3),
)
def test_the_stream_does_not_depend_on_ranks_stages_or_resumes(
    make_loaders, args, paths, launches, stops
):
    """Launch after launch on other ranks, against one that reads all of the tokens in order."""
    one_rank = make_loaders(1, *args, paths=paths)[0]
    mixture, position = one_rank.mixture, one_rank.mixture.start()
    expected = []
    for step in range(1, STEPS + 1):
        of_step = one_rank.reader.schedule.batch_shape(step, GLOBAL_BATCH, L)
        length = of_step.data_tokens + 1
        windows, position = mixture.take(position, of_step.sequences, length)
        expected.append(mixture.read(windows, length).tolist())

    steps, state = [], None
    for (ranks, local), until in zip(
        itertools.cycle(launches), sorted({*stops, STEPS}), strict=False
    ):
        loaders = make_loaders(ranks, *args, paths=paths, local_batch_size=local)
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        read_now = list(itertools.islice(read(loaders, len(steps)), until - len(steps)))
        steps += [windows for windows, _ in read_now]
        state = read_now[-1][1]
    assert steps == expected


@given(stages())
@settings(max_examples=10, deadline=None)
def test_no_change_of_the_bag_size_loses_or_repeats_a_token(make_loaders, args):
    loaders = make_loaders(2, *args, paths="0")
    steps = itertools.islice(read(loaders), STEPS)
    tokens = [token for windows, _ in steps for window in windows for token in window]
    assert tokens == [1 + n % 1200 for n in range(len(tokens))]
    assert len(tokens) == tokens_to_read(loaders[0].job_config, 2, STEPS)


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_change_nothing(make_loaders, workers):
    args = phases("4,3,2", "1,2,2")
    expected = list(itertools.islice(read(make_loaders(1, *args, local_batch_size=2)), STEPS))
    option = f"--training.dataloader.num_workers={workers}"
    loaders = make_loaders(1, *args, option, local_batch_size=2)
    steps = read(loaders)
    assert list(itertools.islice(steps, 4)) == expected[:4]
    (loader,) = make_loaders(1, *args, option, local_batch_size=2)
    loader.load_state_dict(loaders[0].state_dict())  # not of what the workers have read ahead
    assert list(itertools.islice(read([loader], 4), STEPS - 4)) == expected[4:]
    steps.close()


def test_one_rank_reads_what_upstreams_text_path_does(corpus, tokens, make_config):
    """The jsonl file tokenized beforehand, in its order: the same batches."""

    def batches(*args):
        config = make_config(*args, *phases(4, 5), "--training.global_batch_size=8")
        loader = build_dataloader(1, 0, HuggingFaceTokenizer(str(corpus / "tokenizer")), config)
        loader.begin(0)
        return list(itertools.islice(loader, 40))

    shards = ("--training.dataset=token_shards", f"--training.dataset_path={tokens}")
    for (inputs, labels), (other_inputs, other_labels) in zip(
        batches(), batches(*shards), strict=True
    ):
        assert torch.equal(inputs["input"], other_inputs["input"])
        assert torch.equal(labels, other_labels)


def test_the_next_step_is_read_while_the_model_computes(make_loaders, monkeypatch):
    """All of its micro-batches, and no more."""
    loader = make_loaders(1, local_batch_size=2, paths="0")[0]
    mixture_read, reads, enough = loader.mixture.read, [], threading.Event()

    def counted_read(windows, length):
        reads.append(windows)
        if len(reads) == 2 * loader.reader.accumulation:
            enough.set()
        return mixture_read(windows, length)

    monkeypatch.setattr(loader.mixture, "read", counted_read)
    batches = iter(loader)
    for _ in range(loader.reader.accumulation):
        next(batches)
    assert enough.wait(timeout=60)
    time.sleep(0.1)
    assert len(reads) == 2 * loader.reader.accumulation
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_fails_ends_the_run_with_its_name(tmp_path, make_config, workers):
    folder = write_shards(tmp_path / "shards", [[[1] * 2000], [[2] * 2000]])
    config = make_config(
        "--training.dataset=token_shards",
        f"--training.dataset_path={folder}",
        f"--training.dataloader.num_workers={workers}",
    )
    loader = ShardsDataloader(1, 0, None, config)
    (folder / "00001.ds").unlink()
    with pytest.raises(DataError, match=r"ShardError: .*00001\.ds cannot be read any more"):
        for _ in loader:
            pass


def test_at_the_end_the_data_stops(make_loaders):
    stop = "--token_shards.at_end=stop"
    for ranks in (1, 2, 4):
        steps = list(read(make_loaders(ranks, stop, paths="0")))
        assert len(steps) == 1200 // (GLOBAL_BATCH * (L + 1))


def test_metrics_tell_each_sources_part(make_loaders):
    loader = make_loaders(1, "--token_shards.weights", "2", "1", "1")[0]
    assert loader.metrics()["data_share/0(%)"] == 0
    for _ in itertools.islice(read([loader]), STEPS):
        pass
    metrics = loader.metrics()
    read_of_2 = STEPS * GLOBAL_BATCH * (L + 1) / 4
    assert metrics["data_share/0(%)"] == pytest.approx(50)
    assert metrics["data_share/2(%)"] == pytest.approx(25)
    assert metrics["data_epochs/2"] == pytest.approx(read_of_2 / 100)


def test_a_position_in_another_mixture_is_refused(make_loaders):
    state = make_loaders(1)[0].state_dict()
    with pytest.raises(ValueError, match="a mixture of 3 sources, but the config has 1"):
        make_loaders(1, paths="0")[0].load_state_dict(state)


@pytest.mark.parametrize(("infinite", "batches"), [(False, 14), (True, 20)])
def test_validation_reads_from_the_beginning_each_time(
    sources, make_config, corpus, infinite, batches
):
    config = make_config(
        "--validation.dataset=token_shards",
        f"--validation.dataset_path={sources / '0'}",
        "--validation.seq_len=13",
        "--validation.local_batch_size=2",
    )
    loaders = [build_validation_dataloader(3, rank, None, config, infinite) for rank in range(3)]
    for _ in range(2):
        read_by_rank = [list(itertools.islice(loader, 20)) for loader in loaders]
        assert [len(batches_read) for batches_read in read_by_rank] == [batches] * 3
        tokens = [
            token
            for of_ranks in zip(*read_by_rank, strict=True)
            for inputs, labels in of_ranks
            for window in torch.cat([inputs["input"], labels[:, -1:]], 1).tolist()
            for token in window
        ]
        assert tokens == [1 + n % 1200 for n in range(len(tokens))]


# In the trainer

ON = superposition(bag_size=2)


@pytest.fixture
def shards(tokens):
    return ("--training.dataset=token_shards", f"--training.dataset_path={tokens}")


def test_training_is_that_of_the_text_path(train, shards, tmp_path):
    """Loss for loss, with everything between the tokens and the loss."""
    lines = [
        train(*ON, *data, f"--job.dump_folder={tmp_path / name}")
        for name, data in (("text", ()), ("shards", shards))
    ]
    losses = [[line["loss_metrics/global_avg_loss"] for line in run] for run in lines]
    assert losses[0] == losses[1]
    assert lines[1][-1]["data_share/tokens(%)"] == 100


SAVE = saving(2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_in_each_phase(train, shards, tmp_path, workers):
    args = (*ON, *shards, *SAVE, f"--training.dataloader.num_workers={workers}")
    whole = losses(train(*args, f"--job.dump_folder={tmp_path / 'whole'}"))
    for step in (2, 4):
        checkpoint = Path("checkpoint", f"step-{step}")
        shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / f"from-{step}" / checkpoint)
        lines = losses(train(*args, f"--job.dump_folder={tmp_path / f'from-{step}'}"))
        assert lines == {later: whole[later] for later in range(step + 1, 7)}


def test_other_shards_contradict_the_checkpoint(train, shards, tmp_path, corpus):
    train(*shards, *SAVE, "--training.steps=2")
    moved = shutil.copytree(shards[1].partition("=")[2], tmp_path / "moved")
    train(shards[0], f"--training.dataset_path={moved}", *SAVE, "--training.steps=3")
    other = write_shards(tmp_path / "other", [[[1] * 9000]])
    args = (shards[0], f"--training.dataset_path={other}", *SAVE)
    with pytest.raises(CheckpointError, match=r"training\.dataset_path = 'token shards with"):
        train(*args)
    with pytest.raises(CheckpointError, match=r"training\.dataset = 'jsonl', but 'token_shar"):
        train(*SAVE)
    train(*args, "--checkpoint.exclude_from_loading=dataloader", "--training.steps=4")


def test_weights_may_change_if_one_means_it(train, shards, tmp_path, caplog):
    other = write_shards(tmp_path / "other", [[[1] * 9000]])
    folder = shards[1].partition("=")[2]
    args = (shards[0], "--training.dataset_path=None", f"--token_shards.paths={folder},{other}")
    before = train(*args, *SAVE, "--token_shards.weights", "1", "1", "--training.steps=4")
    again = (*args, *SAVE, "--token_shards.weights", "3", "1", "--training.steps=8")
    with pytest.raises(CheckpointError, match=r"token_shards\.weights = \[0\.75, 0\.25\]"):
        train(*again)
    after = train(*again, "--resilience.allow_config_mismatch")
    assert before[-1]["data_share/other(%)"] == 50
    assert after[-1]["data_share/other(%)"] == 37.5  # from there on, a quarter


def test_a_run_ends_with_its_data_without_checkpoints(train, tmp_path):
    short = write_shards(tmp_path / "short", [[[n % 1000 for n in range(2 * 4 * 33)]]])
    args = ("--training.dataset=token_shards", f"--training.dataset_path={short}")
    assert losses(train(*args, "--token_shards.at_end=stop")).keys() == {1, 2}


@pytest.mark.parametrize("interval", [2, 3])
def test_a_run_ends_with_its_data_and_a_checkpoint(train, tmp_path, caplog, interval):
    short = write_shards(tmp_path / "short", [[[n % 1000 for n in range(5 * 4 * 33 + 100)]]])
    args = (
        "--training.dataset=token_shards",
        f"--training.dataset_path={short}",
        "--token_shards.at_end=stop",
        *SAVE,
        f"--checkpoint.interval={interval}",
        "--training.steps=9",
    )
    assert losses(train(*args)).keys() == {1, 2, 3, 4, 5}
    messages = caplog.text
    assert "the run will end after about 5 of 9 steps" in messages
    assert "The data ends after step 5 of 9" in messages
    folder = tmp_path / "run" / "checkpoint"
    assert complete_steps(folder)[-1] == 5
    assert losses(train(*args)).keys() == {1, 2, 3, 4, 5}, "launched again, nothing happens"
    # and with more data, it goes on
    train(*args, "--token_shards.at_end=repeat")
    assert complete_steps(folder)[-1] == 9


def test_a_run_ends_with_its_data_in_superposition(train, tmp_path, caplog):
    short = write_shards(tmp_path / "short", [[[n % 1000 for n in range(2 * 4 * 129 + 100)]]])
    args = (*superposition(4, 5), *SAVE_LAST, "--training.dataset=token_shards")
    args += (f"--training.dataset_path={short}", "--token_shards.at_end=stop")
    assert losses(train(*args)).keys() == {1, 2}
    assert "The data ends after step 2 of 6" in caplog.text
    assert complete_steps(tmp_path / "run" / "checkpoint") == [2]


def test_the_start_says_whether_there_is_enough_data(train, shards, tmp_path, caplog):
    caplog.set_level("INFO")
    train(*ON, *shards, "--training.steps=4")
    total = 3 * 4 * 65 + 4 * 33
    assert f"Data: the run reads {total:,} tokens" in caplog.text
    assert f"{total:,} from tokens, which has" in caplog.text
    assert "at equal data" not in caplog.text
    caplog.clear()
    short = write_shards(tmp_path / "short", [[[1] * (total // 2)]])
    train(*ON, shards[0], f"--training.dataset_path={short}", "--training.steps=4")
    assert "read 2.00 times" in caplog.text
    assert "with the same data, an ordinary run is better" in caplog.text


def test_validation_on_shards(train, tokens):
    """The same windows as of the text that they were made of."""
    args = ("--validation.enable", "--validation.seq_len=32", "--validation.steps=3")
    args += ("--validation.freq=2", "--training.steps=2")
    results = [
        train(*args, f"--validation.dataset={dataset}", f"--validation.dataset_path={path}")
        for dataset, path in (
            ("token_shards", tokens),
            ("jsonl", tokens.parent / "corpus" / "train.jsonl"),
        )
    ]
    validations = [
        [line[VALIDATION_LOSS] for line in lines if VALIDATION_LOSS in line] for lines in results
    ]
    assert validations[0] == validations[1]
    assert len(validations[0]) == 2
