"""Token shards as one sequence, and what is said about those that cannot be trained on."""

import itertools
import json
import resource
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from corpora import write_shards
from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.data.shards.loader import ShardsDataloader
from torchtitan.experiments.tst.data.shards.token_shards import ShardError, TokenShards
from torchtitan.experiments.tst.errors import ConfigError


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_shards_are_one_endless_sequence(tmp_path_factory, token_bytes):
    rng = np.random.default_rng(0)
    top = 2 ** (8 * token_bytes)
    shards = [
        [rng.integers(0, top, rng.integers(1, 40)).tolist() for _ in range(documents)]
        for documents in (3, 0, 1, 5)
    ]
    folder = write_shards(tmp_path_factory.mktemp("shards"), shards, token_bytes)
    source = TokenShards(folder)
    sequence = np.array([token for shard in shards for doc in shard for token in doc])
    assert source.tokens == len(sequence)

    @given(st.integers(0, 3 * len(sequence)), st.integers(0, 3 * len(sequence)))
    def check(position, count):
        read = source.read(position, count)
        assert read.dtype == np.int64
        assert (read == sequence[np.arange(position, position + count) % len(sequence)]).all()

    check()


def test_checksum_is_of_the_order_and_the_tokens(tmp_path):
    def checksum(name, *shards):
        return TokenShards(write_shards(tmp_path / name, shards)).checksum()

    first, second = [[1, 2, 3]], [[4, 5]]
    assert checksum("a", first, second) == checksum("b", first, second)
    others = [
        checksum("c", second, first),
        checksum("d", first),
        checksum("e", [[1, 2, 4]], second),
    ]
    assert len({checksum("f", first, second), *others}) == 4


# Damaged and mismatched inputs: what is done to a good folder of two shards (or to the arguments),
# and what the error must say


def edit(folder, name, function):
    path = folder / name
    path.write_bytes(function(path.read_bytes()))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def metadata(text):
    return lambda folder: (folder / "00001.ds.metadata").write_text(text)


def corpus_file(**content):
    return lambda folder: (folder / "corpus.json").write_text(json.dumps(content))


SHARDS = {"00000.ds": 9, "00001.ds": 6}
DAMAGES = {
    "no folder": (shutil.rmtree, "no such folder"),
    "empty folder": (empty_folder, "has no token shards"),
    "a file in its place": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("")),
        "no such folder",
    ),
    "only empty shards": (
        lambda folder: (empty_folder(folder), write_shards(folder, [[], []])),
        "only empty ones",
    ),
    "missing index": (remove("00001.ds.index"), "00001.ds.index is missing"),
    "missing metadata": (remove("00000.ds.metadata"), "00000.ds.metadata is missing"),
    "truncated": (
        lambda folder: edit(folder, "00001.ds", lambda content: content[:-4]),
        "00001.ds is truncated: it has 4 tokens, but its metadata says 6",
    ),
    "too long": (
        lambda folder: edit(folder, "00001.ds", lambda content: content * 2),
        "00001.ds is too long",
    ),
    "odd byte count": (
        lambda folder: edit(folder, "00001.ds", lambda content: content[:-1]),
        "00001.ds has 11 bytes, not a multiple of the 2 of a token",
    ),
    "odd index": (
        lambda folder: edit(folder, "00000.ds.index", lambda content: content[:-1]),
        "00000.ds.index has 15 bytes, not a multiple of the 8",
    ),
    "index of another shard": (
        lambda folder: shutil.copy(folder / "00000.ds.index", folder / "00001.ds.index"),
        "00001.ds.index ends its last document at token 9, but 00001.ds has 6",
    ),
    "metadata cut off": (metadata("unknown|2"), "00001.ds.metadata is not datatrove's"),
    "metadata without a number": (metadata("unknown|2\nsix\n6 T"), "00001.ds.metadata is not"),
    "tokens of 3 bytes": (metadata("unknown|3\n6\n6 T"), "00001.ds.metadata says 3 bytes a token"),
    "metadata that is no text": (
        lambda folder: (folder / "00001.ds.metadata").write_bytes(b"\xff\xfe|2\n6"),
        "00001.ds.metadata is not datatrove's",
    ),
    "two tokenizers": (
        metadata("gpt2|2\n6\n6 T"),
        "00001.ds has tokenizer = 'gpt2' in its metadata, but 00000.ds has 'unknown'",
    ),
    "two widths": (
        lambda folder: (
            empty_folder(folder),
            write_shards(folder, [[[1]], [[2]]], 4),
            write_shards(folder, [[[1]]], 2),
        ),
        "00001.ds has token_bytes = 4 in its metadata, but 00000.ds has 2",
    ),
    "another tokenizer": (
        lambda folder: write_shards(folder, [[[1]], [[2]]], 2, f"x (xxh3 {'0' * 16})"),
        "00000.ds was made with another tokenizer than the run's: x (xxh3 0000000000000000)",
    ),
    "ids beyond the vocabulary": (
        lambda folder: write_shards(folder, [[[1]], [[2, 1024]]]),
        "00001.ds has token id 1024 at token 1, but the run's tokenizer (model.hf_assets_path) ",
    ),
    "unfinished": (
        corpus_file(complete=False, shards={}),
        "its tokenization was not finished; run the same `tst tokenize` command",
    ),
    "a listed shard is missing": (
        corpus_file(complete=True, shards=SHARDS | {"00002.ds": 1}),
        "00002.ds has no tokens, but corpus.json in the same folder says 1",
    ),
    "a shard too many": (
        corpus_file(complete=True, shards={"00000.ds": 9}),
        "00001.ds has 6 tokens, but corpus.json in the same folder says none",
    ),
    "a shard of another corpus": (
        corpus_file(complete=True, shards=SHARDS | {"00001.ds": 7}),
        "00001.ds has 6 tokens, but corpus.json in the same folder says 7",
    ),
    "corpus.json cut off": (
        lambda folder: (folder / "corpus.json").write_text('{"complete": tr'),
        "corpus.json is damaged",
    ),
    "corpus.json of something else": (corpus_file(name="x"), "corpus.json is damaged: KeyError"),
}


@pytest.fixture
def good(tmp_path):
    return write_shards(tmp_path / "shards", [[[1, 2, 3, 4], [5, 6, 7, 8, 9]], [[10] * 6]])


@pytest.mark.parametrize(
    ("section", "case"),
    [
        *(("training", case) for case in DAMAGES),
        *(("validation", case) for case in ("no folder", "truncated", "another tokenizer")),
    ],
)
def test_bad_shards(make_config, good, case, section):
    args = [f"--{section}.dataset=token_shards", f"--{section}.dataset_path={good}"]
    if section == "validation":
        args += ["--validation.enable", "--validation.seq_len=32", "--validation.steps=1"]
    check_job(make_config(*args))
    damage, said = DAMAGES[case]
    damage(good)
    with pytest.raises(ConfigError) as error:
        check_job(make_config(*args))
    assert str(error.value).startswith(f"{section}.dataset_path = '{good}': ")
    assert said in str(error.value)


def test_two_bytes_are_too_few_for_a_large_vocabulary(good, corpus):
    class Large(HuggingFaceTokenizer):
        def get_vocab(self):
            return super().get_vocab() | {"<|last|>": 128_255}

    with pytest.raises(ShardError, match="2 bytes a token, too few for the 128,256 entries"):
        TokenShards(good, Large(str(corpus / "tokenizer")))


A, B = "{good}", "{good}/../other"
VALIDATION = ("--validation.enable", "--validation.seq_len=32", "--validation.dataset=token_shards")
ARGUMENTS = [
    ([], ["training.dataset_path = None", "needs either a folder here, or several in"]),
    ([f"--training.dataset_path={A}", "--token_shards.paths", A], ["but not both"]),
    (["--token_shards.paths", f"{A},{A}"], ["token_shards.paths", "must be different folders"]),
    (["--token_shards.paths", A + ",{good}/../shards"], ["must be different folders"]),
    (
        [f"--training.dataset_path={A}", "--token_shards.at_end=stop"],
        ["token_shards.at_end = 'stop': there are too few tokens for the first step"],
    ),
    (
        [
            *("--training.dataset=jsonl", "--training.dataset_path={good}/00000.ds"),
            "--token_shards.at_end=stop",
        ],
        ["token_shards.at_end = 'stop'", 'needs training.dataset = "token_shards"'],
    ),
    (
        [f"--training.dataset_path={A}", *VALIDATION],
        ["validation.dataset_path = None: must be a folder of token shards"],
    ),
    (
        [f"--training.dataset_path={A}", *VALIDATION, f"--validation.dataset_path={A}"],
        ["validation.dataset_path", "has 15 tokens, fewer than the 264 of one batch on all ranks"],
    ),
    (
        ["--token_shards.paths", f"{A},{B}", "--token_shards.weights", "1"],
        ["token_shards.weights = [1.0]", "one for each of the 2 folders"],
    ),
    (
        ["--token_shards.paths", f"{A},{B}", "--token_shards.weights", "1", "0"],
        ["token_shards.weights = [1.0, 0.0]", "finite numbers above 0"],
    ),
    (
        ["--token_shards.paths", f"{A},{B}", "--token_shards.weights", "1", "nan"],
        ["token_shards.weights = [1.0, nan]", "finite numbers above 0"],
    ),
    (["--token_shards.paths", A + ",{good}/none"], ["token_shards.paths", "none: no such folder"]),
    (
        [
            *("--training.dataset=jsonl", "--training.dataset_path={good}/00000.ds"),
            *("--token_shards.paths", A),
        ],
        ["token_shards.paths", "needs training.dataset = \"token_shards\" (it is 'jsonl')"],
    ),
]


@pytest.mark.parametrize(("args", "said"), ARGUMENTS)
def test_bad_arguments(make_config, good, args, said):
    shutil.copytree(good, good.parent / "other")
    path = ["--training.dataset_path=None"]
    args = ["--training.dataset=token_shards", *path, *(arg.format(good=good) for arg in args)]
    with pytest.raises(ConfigError) as error:
        check_job(make_config(*args))
    for fragment in said:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ('paths = "a"', "token_shards.paths = 'a': must be a list of strings"),
        ("paths = [1]", "token_shards.paths = [1]: must be a list of strings"),
        ("weights = [true]", "token_shards.weights = [True]: must be a list of numbers"),
        ("weights = [1, -2]", "token_shards.weights = [1, -2]: must be a list of finite"),
        ('at_end = "loop"', "token_shards.at_end = 'loop': must be one of repeat, stop"),
        ("weight = [1]", "token_shards.weight = [1]: unknown key; did you mean weights?"),
    ],
)
def test_bad_toml(make_config, tmp_path, toml, said):
    (tmp_path / "job.toml").write_text(f"[token_shards]\n{toml}\n")
    with pytest.raises(ConfigError) as error:
        check_job(make_config(f"--job.config_file={tmp_path / 'job.toml'}"))
    assert said in str(error.value)


def test_shards_that_change_under_the_run(tmp_path):
    folder = write_shards(tmp_path, [[[1] * 4096], [[2] * 4096]])
    source = TokenShards(folder)
    source.read(0, 4096)
    with (folder / "00000.ds").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(ShardError, match=r"00000.ds cannot be read any more"):
        source.read(0, 4096)
    (folder / "00001.ds").unlink()
    with pytest.raises(ShardError, match=r"00001.ds cannot be read any more"):
        source.read(4096, 10)


def peak():
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def read_all(args):
    loader = ShardsDataloader(1, 0, None, SuperpositionConfigManager().parse_args(args))
    (source,) = loader.mixture.sources
    batches = iter(loader)
    for _ in itertools.islice(batches, 5):
        before = peak()
    while loader.position.tokens[0] < source.tokens:
        next(batches)
    print(f"peak resident memory {before} MB, after the pass {peak()} MB")
    assert peak() - before < 50


def test_memory_stays_flat_over_a_pass(tmp_path, base_args, on_ranks):
    """Of the loader's process, over shards of 500 MB."""
    tokens = 2**28
    folder = write_shards(tmp_path, [[[0]]])
    with (folder / "00000.ds").open("wb") as file:
        file.truncate(2 * tokens)  # takes no room on the disk
    (folder / "00000.ds.index").write_bytes(tokens.to_bytes(8, "little"))
    (folder / "00000.ds.metadata").write_text(f"unknown|2\n{tokens}\n268 MT")
    job = ["training.dataset=token_shards", f"training.dataset_path={folder}"]
    job += ["training.seq_len=32768", "training.local_batch_size=16"]
    on_ranks(1, read_all, [*base_args, *(f"--{argument}" for argument in job)])
