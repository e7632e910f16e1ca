"""Shards have upstream's tokens, are the same every time, and say when they are complete."""

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from tokenizers import Tokenizer, processors
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from corpora import DCLM, FINEWEB_EDU, documents, prepare_here, tokenize, write_jsonl
from jobs import ROOT
from torchtitan.experiments.tst.data.shards import executors, tokenization_input
from torchtitan.experiments.tst.data.shards.token_shards import ShardError, TokenShards
from torchtitan.experiments.tst.data.shards.tokenization import Options, TokenizationError
from torchtitan.experiments.tst.testing import ranks

TOKENIZE = (sys.executable, "-m", "torchtitan.experiments.tst", "tokenize")


# Which of BOS and EOS the tokenizer itself adds, and what its config names


TOKENIZERS = {
    "adds neither": (None, True),
    "adds BOS, as Llama 3's": ("<|begin_of_text|> $A", True),
    "adds both": ("<|begin_of_text|> $A <|end_of_text|>", True),
    "has no config": (None, False),
}


@pytest.fixture(params=TOKENIZERS)
def assets(request, corpus, tmp_path):
    template, config = TOKENIZERS[request.param]
    folder = shutil.copytree(corpus / "tokenizer", tmp_path / "assets")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if template:
        names = ["<|begin_of_text|>", "<|end_of_text|>"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    if not config:
        (folder / "tokenizer_config.json").unlink()
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("padded", [False, True])
def test_a_documents_tokens_are_those_of_upstreams_text_path(texts, assets, tmp_path, padded):
    if padded:
        tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
        tokenizer.enable_padding(length=None)
        tokenizer.save(str(assets / "tokenizer.json"))
    write_jsonl(tmp_path / "a.jsonl", texts)
    tokenize(tmp_path / "a.jsonl", tmp_path / "out", Options(str(assets), shuffle="none"))
    upstream = HuggingFaceTokenizer(str(assets))
    expected = [upstream.encode(text, add_bos=True, add_eos=True) for text in texts]
    assert documents(tmp_path / "out") == expected
    TokenShards(tmp_path / "out", upstream)  # is of this tokenizer


def test_wide_vocabulary_takes_four_bytes(texts, corpus, tmp_path):
    assets = shutil.copytree(corpus / "tokenizer", tmp_path / "assets")
    model = json.loads((assets / "tokenizer.json").read_text())
    model["added_tokens"].append(model["added_tokens"][0] | {"id": 2**16, "content": "<|last|>"})
    model["model"]["vocab"]["<|last|>"] = 2**16  # few entries, and a high id
    (assets / "tokenizer.json").write_text(json.dumps(model))
    write_jsonl(tmp_path / "a.jsonl", ["one <|last|>", "two"])
    tokenize(tmp_path / "a.jsonl", tmp_path / "out", Options(str(assets), shuffle="none"))
    tokens = TokenShards(tmp_path / "out", HuggingFaceTokenizer(str(assets)))
    assert 2**16 in tokens.read(0, tokens.tokens)


def zst(path, mode):
    return zstandard.open(path, mode)


@pytest.fixture(params=["jsonl", "jsonl.gz", "dclm", "fineweb_edu", "parquet of text alone"])
def source(request, texts, tmp_path):
    """A folder of two files in the form of a public corpus."""
    folder = tmp_path / "source" / "sub"
    folder.mkdir(parents=True)
    for number, part in enumerate((texts[:90], texts[90:])):
        if request.param == "jsonl":
            write_jsonl(folder / f"{number}.jsonl", part)
        elif request.param == "jsonl.gz":
            write_jsonl(folder / f"c4-train.{number}.json.gz", part, gzip.open)
        elif request.param == "dclm":
            extra = {"metadata": {"WARC-Truncated": "length"}} if number else {}
            with zst(folder / f"shard_{number}_processed.jsonl.zst", "wt") as file:
                for text in part:
                    file.write(json.dumps(DCLM | extra | {"text": text}) + "\n")
        else:
            rows = {"text": part}
            if request.param == "fineweb_edu":
                extra = {"date": "2013-05-18T05:48:54Z"} if number else {}
                rows |= {k: [v] * len(part) for k, v in (FINEWEB_EDU | extra).items()}
            pq.write_table(pa.table(rows), folder / f"00{number}_00000.parquet")
    return folder.parent


def test_forms_of_public_corpora(source, texts, corpus, tmp_path):
    options = Options(str(corpus / "tokenizer"), shuffle="none")
    tokenize(source, tmp_path / "out", options)
    upstream = HuggingFaceTokenizer(str(corpus / "tokenizer"))
    assert documents(tmp_path / "out") == [
        upstream.encode(t, add_bos=True, add_eos=True) for t in texts
    ]
    content = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert content["settings"]["tasks"] == len(content["shards"]) == 2
    assert content["documents"] == len(texts)
    assert (
        content["tokens"]
        == sum(content["shards"].values())
        == sum(map(len, documents(tmp_path / "out")))
    )


def test_a_dataset_by_its_name_on_the_hub(texts, corpus, tmp_path, monkeypatch):
    """The name of a local folder, as the hub cannot be reached."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "owner" / "name" / "train.jsonl", texts)
    monkeypatch.setattr(tokenization_input, "_is_hub_name", lambda source: source == "owner/name")
    monkeypatch.setattr(tokenization_input, "dataset_info", lambda name, timeout: name)
    tokenize("owner/name", tmp_path / "out", Options(str(corpus / "tokenizer"), shuffle="none"))
    assert len(documents(tmp_path / "out")) == len(texts)


@pytest.mark.parametrize("merge", [False, True])
def test_documents_are_shuffled(two_files, texts, corpus, tmp_path, merge):
    def shuffled(name, **options):
        options = Options(str(corpus / "tokenizer"), merge=merge, **options)
        tokenize(two_files, tmp_path / name, options)
        return documents(tmp_path / name)

    ordered = shuffled("a", shuffle="none")
    assert shuffled("b") != ordered
    assert sorted(shuffled("b")) == sorted(ordered)
    assert shuffled("c") == shuffled("b")
    assert shuffled("d", seed=1) != shuffled("b")
    if merge:  # over the files
        first = {tuple(tokens) for tokens in ordered[:90]}
        of_first_file = [tuple(tokens) in first for tokens in shuffled("b")]
        assert any(of_first_file[-90:])
        assert not list((tmp_path / "b").glob("parts"))


@pytest.mark.parametrize("merge", [False, True])
def test_chunks_are_shuffled(two_files, corpus, tmp_path, merge):
    common = {"tokenizer": str(corpus / "tokenizer"), "merge": merge}
    tokenize(two_files, tmp_path / "a", Options(**common, shuffle="none"))
    tokenize(two_files, tmp_path / "b", Options(**common, shuffle="chunks", chunk_tokens=50))
    before, after = TokenShards(tmp_path / "a"), TokenShards(tmp_path / "b")
    content = json.loads((tmp_path / "b" / "corpus.json").read_text())
    assert after.tokens % 50 == 0
    assert content["dropped_tokens"] == before.tokens - after.tokens < 100
    # a document of more than a chunk is no longer in one piece
    long = max(documents(tmp_path / "a"), key=len)
    text = " ".join(map(str, after.read(0, after.tokens)))
    assert len(long) > 200 and " ".join(map(str, long)) not in text


def test_files_without_a_chunk_or_a_document(two_files, corpus, tmp_path):
    write_jsonl(two_files / "2.jsonl", ["too short for a chunk"])
    (two_files / "3.jsonl").touch()
    common = {"tokenizer": str(corpus / "tokenizer"), "shuffle": "chunks", "chunk_tokens": 500}
    for merge in (False, True):
        tokenize(two_files, tmp_path / str(merge), Options(**common, merge=merge))
        assert TokenShards(tmp_path / str(merge)).tokens % 500 == 0


def test_shards_are_split(two_files, corpus, tmp_path):
    for merge in (False, True):
        folder = tmp_path / str(merge)
        tokenize(
            two_files, folder, Options(str(corpus / "tokenizer"), merge=merge, shard_tokens=5000)
        )
        assert len(list(folder.glob("*.ds"))) > 2
        TokenShards(folder)


# Again, and after a kill


def tokenize_until_killed(source, folder, options):
    """In this process, which is killed in its third task."""
    completions = folder / "logs" / "tokenize" / "completions"
    write = TokenizedFile.write

    def write_or_die(self, *args):
        if len(list(completions.glob("*"))) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *args)

    TokenizedFile.write = write_or_die
    tokenize(source, folder, options)


def test_killed_in_a_task_and_again_gives_the_same_shards(texts, corpus, tmp_path, tst):
    source, folder = tmp_path / "source", tmp_path / "killed"
    source.mkdir()
    for number in range(5):
        write_jsonl(source / f"{number}.jsonl", texts[number::5])
    options = Options(str(corpus / "tokenizer"))
    tokenize(source, tmp_path / "whole", options)
    log = ranks.run_ranks(tokenize_until_killed, 1, tmp_path, source, folder, options)
    assert log.startswith(f"rank 0 ended with {-signal.SIGKILL}")
    with pytest.raises(ShardError, match="its tokenization was not finished"):
        TokenShards(folder)
    given = ("--tokenizer", options.tokenizer, "--workers", 1)
    result = tst("tokenize", source, folder, *given)
    assert result.code == 0, result.stderr
    assert files(folder) == files(tmp_path / "whole")
    content = json.loads((folder / "corpus.json").read_text())
    assert f"{content['documents']:,} documents, {content['tokens']:,} tokens" in result.stdout
    assert "tokens/s" in result.stdout
    with pytest.raises(TokenizationError, match="has a corpus with seed = 0, not 1"):
        tokenize(source, folder, dataclasses.replace(options, seed=1))


def run_command(*args, check=True, **options):
    command = [*TOKENIZE, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def many(corpus, tmp_path_factory):
    """Ten files, enough work to be killed in."""
    folder = tmp_path_factory.mktemp("many")
    lines = (corpus / "train.jsonl").read_text().splitlines(keepends=True)
    for number in range(10):
        (folder / f"{number}.jsonl").write_text("".join(lines[number::10]))
    return folder


@pytest.fixture(scope="module")
def whole(many, corpus, tmp_path_factory):
    """Tokenized without a kill."""
    folder = tmp_path_factory.mktemp("whole") / "tokens"
    result = run_command(many, folder, "--tokenizer", corpus / "tokenizer", "--workers", "2")
    assert "10/10" in result.stderr  # progress
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["all", "main process"])
def test_killed_midway_and_again_gives_the_same_shards(many, whole, corpus, tmp_path, whom):
    args = ["--tokenizer", corpus / "tokenizer", "--workers", "2"]
    folder = tmp_path / "killed"
    completions = folder / "logs" / "tokenize" / "completions"
    command = [*TOKENIZE, *map(str, (many, folder, *args))]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(list(completions.glob("*"))) < 2:
        time.sleep(0.01)
    if whom == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:  # its workers go on until their tasks are done
        process.kill()
    process.wait()
    assert 2 <= len(list(completions.glob("*"))) < 10
    with pytest.raises(ShardError, match="its tokenization was not finished"):
        TokenShards(folder)
    run_command(many, folder, *args)
    assert files(folder) == files(whole)
    if whom == "all":  # complete, and refused for other arguments
        result = run_command(many, folder, *args, "--seed", "1", check=False)
        assert result.returncode == 2
        assert "error: " in result.stderr and "has a corpus with seed = 0, not 1" in result.stderr


def test_a_task_is_not_run_twice_at_once(two_files, corpus, tmp_path):
    """As when the workers of a launch that was killed are still at work."""
    first, _ = prepare_here(two_files, tmp_path / "out", Options(str(corpus / "tokenizer")))
    lock = tmp_path / "out" / "logs" / "tokenize" / "locks" / "00000"
    lock.parent.mkdir(parents=True)
    command = "import fcntl, sys; fcntl.flock(f := open(sys.argv[1], 'w'), 2); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", command, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        thread = threading.Thread(target=first.run)
        thread.start()
        thread.join(1)
        assert thread.is_alive() and not list((tmp_path / "out").glob("*.ds"))
        holder.communicate(b"\n")
    thread.join(30)
    assert len(list((tmp_path / "out").glob("*.ds"))) == 2


def test_a_launch_killed_at_once_is_begun_again(two_files, corpus, tmp_path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "corpus.json.unfinished").write_text("{")
    tokenize(two_files, tmp_path / "out", Options(str(corpus / "tokenizer")))
    TokenShards(tmp_path / "out")


SBATCH = """#!/bin/sh
# Runs an array job here and now, as Slurm would later.
while [ $# -gt 1 ]; do shift; done
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for task in $(seq 0 "${last:-0}"); do
    export SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here SLURM_JOB_ID=7
    sh "$1" >> "$SLURM_OUT" 2>&1 || exit 1
done
echo "Submitted batch job 7"
"""


@pytest.mark.slow
def test_slurm_job_arrays(texts, corpus, tmp_path):
    """Against stand-ins for sbatch, srun and scontrol, which run the jobs at once."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, content in {
        "sbatch": SBATCH,
        "srun": '#!/bin/sh\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/sh\necho here\n",
    }.items():
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    source = tmp_path / "source"
    source.mkdir()
    for number in range(2):
        write_jsonl(source / f"{number}.jsonl", texts[number::2])
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{tools}:{scripts}:{os.environ['PATH']}",
        "SLURM_OUT": str(tmp_path / "slurm.out"),
    }
    args = [source, tmp_path / "out", "--tokenizer", corpus / "tokenizer", "--executor", "slurm"]
    args += ["--partition", "cpu", "--time", "01:00:00", "--sbatch", "account", "me"]
    run_command(*args, env=environment)
    assert sorted(documents(tmp_path / "out")) == sorted(
        HuggingFaceTokenizer(str(corpus / "tokenizer")).encode(t, add_bos=True, add_eos=True)
        for t in texts
    )
    TokenShards(tmp_path / "out")
    script = (tmp_path / "out" / "logs" / "tokenize" / "launch_script.slurm").read_text()
    for line in ("partition=cpu", "time=01:00:00", "account=me", "array=0-1"):
        assert f"#SBATCH --{line}" in script


def test_progress_of_many_shards_takes_little_of_the_time(tmp_path, monkeypatch):
    looks = []

    def slow_look(folder, pattern):
        looks.append(pattern)
        time.sleep(0.3)
        return []

    monkeypatch.setattr(Path, "rglob", slow_look)
    with executors._progress("Tokenizing", 1, tmp_path, tmp_path):
        time.sleep(3)
    assert len(looks) == 2  # after a second, and at the end
