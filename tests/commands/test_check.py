"""``tst check``: everything that stops a job, found without starting it."""

import json
import os
import shutil
import time

import pytest
import torch
import torch.distributed as dist
import torchtitan.protocols.train_spec as train_spec_module

from jobs import BOUNDARY, IN_STAGES, ON, SAVE, STEPS, B, L, S, small_job, superposition
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.data import demo_corpus
from torchtitan.experiments.tst.data.shards.token_shards import TokenShards
from torchtitan.experiments.tst.start import check

DEMO = "train_configs/demo/tst.toml"


def parameters(flavor):
    spec = train_spec_module.get_train_spec("llama3")
    with torch.device("meta"):
        model = spec.model_cls(spec.model_args[flavor])
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_job_that_can_run_and_its_numbers(tst, job, base_args, tmp_path):
    run, of_step = tmp_path / "run", 2 * B * 2
    result = tst(
        *("check", job, "--nproc=2", *base_args, *ON),
        *(f"--training.global_batch_size={of_step}", f"--job.dump_folder={run}"),
    )
    assert result.code == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [
        f"{job}: all checks passed",
        f"  llama3 demo, {parameters('demo'):,} parameters, on 2 ranks",
        f"  batch: {of_step} sequences = 2 data-parallel ranks x {B} x 2 micro-batches",
        f"  superposition: steps 1 to {BOUNDARY}, bags of {S} tokens; {of_step * L * S:,} data "
        f"tokens a step, {BOUNDARY * of_step * L * S:,} in all",
        f"  recovery: steps {BOUNDARY + 1} to {STEPS}; {of_step * L:,} data tokens a step, "
        f"{(STEPS - BOUNDARY) * of_step * L:,} in all",
        f"  run folder: {run}",
    ]
    assert not run.exists()


def test_a_job_in_stages_has_a_line_for_each(tst, job, base_args):
    result = tst("check", job, "--nproc=1", *base_args, *IN_STAGES)
    stages = [line.partition(";")[0] for line in result.stdout.splitlines()[3:7]]
    assert stages == [
        "  superposition: steps 1 to 1, bags of 4 tokens",
        "  superposition: steps 2 to 3, bags of 2 tokens",
        "  superposition: steps 4 to 4, bags of 3 tokens",
        "  recovery: steps 5 to 6",
    ]


def test_a_job_without_superposition_has_one_phase(tst, job, base_args):
    phase, _ = tst("check", job, "--nproc=1", *base_args).stdout.splitlines()[3:]
    assert phase.startswith(f"  recovery: steps 1 to {STEPS}; ")


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ([], 3),
        (["--nproc=2"], 2),
        (["--nnodes=2"], 6),
        (["--nproc=2", "--nnodes=8"], 16),
        (["--ranks=24"], 24),
    ],
)
def test_how_many_ranks(tst, job, base_args, monkeypatch, options, ranks):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    _, model, batch, *_ = tst("check", job, *options, *base_args).stdout.splitlines()
    assert model.endswith(f" on {ranks} ranks")
    assert batch.startswith(f"  batch: {ranks * B} sequences = {ranks} data-parallel ranks x {B} ")


def test_no_more_processes_than_gpus(tst, job, base_args, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    for command in ("check", "train"):
        result = tst(command, job, "--nproc=4", *base_args)
        assert (result.code, result.stdout) == (2, "")
        assert result.stderr == (
            "config error: --nproc 4: must be at most 3, the number of GPUs of this machine\n"
        )


def test_a_cluster_is_here_or_elsewhere(tst, job, base_args):
    for option in ("--nproc=2", "--nnodes=2"):
        result = tst("check", job, "--ranks=8", option, *base_args)
        assert result.code == 2 and "--ranks is for another cluster" in result.stderr


def test_ranks_of_a_layout_share_their_data(tst, job, base_args):
    layout = "--parallelism.tensor_parallel_degree=2"
    _, model, batch, *_ = tst("check", job, "--ranks=8", *base_args, layout).stdout.splitlines()
    assert model.endswith(" on 8 ranks")
    assert batch == f"  batch: {4 * B} sequences = 4 data-parallel ranks x {B} x 1 micro-batches"


def test_of_a_cluster_this_machine_is_not_asked(tst, job, base_args):
    needs_gpu = ("--checkpoint.enable", "--checkpoint.async_mode=async_with_pinned_mem")
    result = tst("check", job, "--nproc=2", *base_args, *needs_gpu)
    assert result.code == 2 and result.stdout == ""
    assert result.stderr.startswith("config error: checkpoint.async_mode = 'async_with_pinned_mem'")
    result = tst("check", job, "--ranks=2", *base_args, *needs_gpu)
    assert result.code == 0, result.stderr
    result = tst("check", job, "--ranks=2", *base_args, "--training.dataset_path=/none")
    assert result.code == 2  # files are looked at all the same
    assert result.stderr.startswith("config error: training.dataset_path = '/none': ")


@pytest.mark.parametrize("key", ["model.hf_assets_path", "training.dataset_path"])
def test_files_are_looked_at_or_not(tst, job, base_args, key):
    command = ("check", job, "--nproc=2", *base_args, f"--{key}=/none")
    result = tst(*command)
    assert result.code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"config error: {key} = '/none': ")
    result = tst(*command, "--no-files")
    assert result.code == 0 and "all checks passed" in result.stdout, result.stderr


def test_a_folder_that_cannot_be_written(tst, job, base_args, tmp_path):
    (tmp_path / "file").touch()
    result = tst("check", job, *base_args, f"--job.dump_folder={tmp_path / 'file' / 'run'}")
    assert result.code == 2
    assert result.stderr.startswith("config error: job.dump_folder = ")


@pytest.mark.parametrize(
    ("toml", "args", "error"),
    [
        ("[training]\nstepz = 3", [], "training.stepz = 3: unknown key"),
        ("", ["--training.stepz=3"], "training.stepz = '3': unknown key"),
        ("[training]\nsteps = 'many'", [], "training.steps = 'many': "),
        ("", ["--training.seq_len=0"], "training.seq_len = 0: must be"),
        ("", [*ON, "--superposition.steps=6"], "superposition.steps = 6: 6 superposition steps"),
        ("", ["--training.global_batch_size=12"], "training.global_batch_size = 12: must be a "),
        ("no TOML", [], "job.config_file = "),
    ],
)
def test_a_job_that_cannot_run(tst, job, base_args, toml, args, error):
    job.write_text(toml)
    result = tst("check", job, "--nproc=2", *base_args, *args)
    assert result.code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"config error: {error}")


@pytest.mark.parametrize(
    ("args", "loads"),
    [([], f"step-{STEPS}"), (["--checkpoint.load_step=2"], "step-2"), (["fewer"], "step-4")],
)
def test_what_the_job_would_resume_from(tst, job, base_args, whole, tmp_path, args, loads):
    folder = whole.folder
    if args == ["fewer"]:
        folder, args = tmp_path / "run", []
        for step in (2, 4):
            name = f"checkpoint/step-{step}"
            shutil.copytree(whole.folder / name, folder / name)
    one = ("check", job, "--nproc=1", *base_args, *ON, *SAVE, f"--job.dump_folder={folder}")
    result = tst(*one, *args)
    assert result.code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"  loads {folder}/checkpoint/{loads}"
    result = tst(*one, *args, *superposition(2))
    assert result.code == 2 and result.stdout == ""
    assert result.stderr.startswith(
        f"checkpoint error: the config contradicts the checkpoint {folder}/checkpoint/{loads}:\n"
    )
    assert result.stderr.count("error") == 1
    assert "superposition.bag_size" in result.stderr


def test_a_job_that_starts_at_step_1_loads_nothing(tst, job, base_args, tmp_path):
    save = (*SAVE, f"--job.dump_folder={tmp_path / 'run'}")
    result = tst("check", job, "--nproc=1", *base_args, *ON, *save)
    assert result.code == 0 and "loads" not in result.stdout, result.stderr
    result = tst("check", job, "--nproc=1", *base_args, *ON, *save, "--checkpoint.load_step=2")
    assert result.code == 2
    assert result.stderr.startswith("checkpoint error: checkpoint.load_step = 2: ")


SOURCES = [f"def f_{n}(x):\n    return x + {n}\n\n\n" * 40 for n in range(40)]


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Where the demo's corpus would be made, of a few sources."""
    folder = tmp_path / "outputs" / "corpus"
    monkeypatch.setattr(demo_corpus, "FOLDER", folder)
    monkeypatch.setattr(demo_corpus, "read_sources", lambda: iter(SOURCES))
    return folder


def test_the_demos_corpus_is_made_when_it_is_read(tst, demo):
    paths = (
        f"--model.hf_assets_path={demo / 'tokenizer'}",
        f"--training.dataset_path={demo / 'tokens'}",
        f"--validation.dataset_path={demo / 'validation.jsonl'}",
    )
    result = tst("check", DEMO, "--nproc=2", *paths)
    assert result.code == 0, result.stderr
    assert result.stdout.startswith("Making the demo corpus from ")
    assert TokenShards(str(demo / "tokens"), None).tokens > 10_000
    made = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    result = tst("check", DEMO, "--nproc=2", *paths)
    assert result.stdout.startswith(f"{DEMO}: all checks passed\n")
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == made


def test_its_token_shards_are_finished_where_they_were_cut_short(tst, demo):
    paths = (
        f"--model.hf_assets_path={demo / 'tokenizer'}",
        f"--training.dataset_path={demo / 'tokens'}",
        f"--validation.dataset_path={demo / 'validation.jsonl'}",
    )
    assert tst("check", DEMO, "--nproc=2", *paths).code == 0
    corpus = demo / "tokens" / "corpus.json"
    content = json.loads(corpus.read_text())
    corpus.write_text(json.dumps(content | {"complete": False}))  # as a kill leaves it
    shutil.rmtree(demo / "tokens" / "logs" / "finish" / "completions")
    result = tst("check", DEMO, "--nproc=2", *paths)
    assert result.code == 0, result.stderr
    assert json.loads(corpus.read_text()) == content


def test_its_token_shards_are_made_only_for_a_job_that_reads_them(tst, job, demo):
    result = tst("check", job, *small_job(demo))
    assert result.code == 0, result.stderr
    assert sorted(path.name for path in demo.iterdir()) == [
        *("tokenizer", "train.jsonl", "validation.jsonl")
    ]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ([], 0),
        (["--no-files", "--model.hf_assets_path={}/corpus/tokenizer"], 0),
        (["--training.seq_len=0", "--model.hf_assets_path={}/corpus/tokenizer"], 2),
        (["--training.dataset_path={}/corpus-of-mine/train.jsonl"], 2),
    ],
    ids=["reads another", "no files", "cannot run", "beside it"],
)
def test_otherwise_it_is_not_made(tst, job, base_args, demo, args, code):
    result = tst("check", job, *base_args, *(arg.format(demo.parent) for arg in args))
    assert result.code == code, result.stderr
    assert not demo.parent.exists()


def check_demo(folder):
    """In a process of its own: check a job that reads the corpus, which takes time to make."""

    def read_slowly():
        with (folder / f"read-by-{os.getpid()}").open("x"):
            time.sleep(0.5)
        return iter(SOURCES)

    demo_corpus.FOLDER = folder / "corpus"
    demo_corpus.read_sources = read_slowly
    dist.barrier()
    check(SuperpositionConfigManager().parse_args(small_job(demo_corpus.FOLDER)), 2)


def test_two_checks_at_the_same_time_make_it_once(on_ranks, tmp_path):
    on_ranks(2, check_demo, tmp_path)
    assert len(list(tmp_path.glob("read-by-*"))) == 1
    assert (tmp_path / "corpus" / "train.jsonl").stat().st_size > 10_000
