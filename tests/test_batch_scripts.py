"""The batch scripts with stand-ins for Slurm's commands; with a real Slurm in test_slurm.py."""

import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import slurm_stand_ins
from jobs import ROOT
from launches import modules_run, recording_modules
from slurm_stand_ins import BATCH_SCRIPTS, SLURM

RUN_TRAIN = ROOT / "run_train.sh"
TRAIN = "torchtitan.experiments.tst.train"


@pytest.fixture
def script(tmp_path):
    return slurm_stand_ins.runner(tmp_path)


def test_both_nodes_start_the_job(script, tmp_path):
    result, calls = script("train.sbatch", "--training.steps=5", SLURM_RESTART_COUNT="2")
    assert result.returncode == 0
    check, *launches = calls
    assert check == f"tst check {tmp_path}/job.toml --nproc=4 --nnodes=2 --training.steps=5"
    assert [call.partition(":")[0] for call in launches] == ["node 0", "node 1"]
    for call, shown in zip(launches, ("0", "-1"), strict=True):
        for option in (
            "--nnodes=2 --nproc_per_node=4 --rdzv_id=7.2 ",
            f"--local-ranks-filter={shown} ",
            f"-m {TRAIN} --job.config_file {tmp_path}/job.toml --training.steps=5",
        ):
            assert option in call


def test_only_a_job_of_this_package_is_checked(script):
    result, calls = script("train.sbatch", TRAIN_FILE="torchtitan.train")
    assert result.returncode == 0
    assert [call.partition(":")[0] for call in calls] == ["node 0", "node 1"]
    assert all(" -m torchtitan.train --job.config_file " in call for call in calls)


def test_run_train_is_tst_train(script, tmp_path):
    job = tmp_path / "job.toml"
    result, (call,) = script(RUN_TRAIN, "--training.steps=5", EXIT_CODE="75")
    assert result.returncode == 75
    options = f"--nproc=4 --log-rank=0 --module={TRAIN}"
    assert call == f"tst train {job} {options} --training.steps=5"
    result, (call,) = script(RUN_TRAIN, LOG_RANK="0,3", TRAIN_FILE="my.train", NGPU="")
    assert result.returncode == 0
    assert call == f"tst train {job} --nproc=2 --log-rank=0,3 --module=my.train"
    result, (call,) = script(RUN_TRAIN, COMM_MODE="fake_backend", NGPU="64")
    assert result.returncode == 0
    options = f"--nproc=64 --log-rank=0 --module={TRAIN}"
    assert call == f"tst train {job} {options} --comm.mode=fake_backend"


@pytest.mark.parametrize(
    ("path", "args", "error"),
    [
        (
            "train.sbatch",
            ["--training.local_batch_size=3", "--training.global_batch_size=12"],
            "config error: training.global_batch_size = 12: must be a multiple of 24 "
            "(training.local_batch_size = 3 on each of 8 data-parallel ranks)",
        ),
        (
            RUN_TRAIN,
            ["--training.dataset_path=no.jsonl"],
            "config error: training.dataset_path = 'no.jsonl': ",
        ),
    ],
    ids=["train.sbatch", "run_train.sh"],
)
def test_a_job_that_cannot_run_is_not_started(script, base_args, tmp_path, path, args, error):
    """Its error is one line; on Slurm, no node hears of it and it is not queued again."""
    recording = recording_modules(tmp_path / "site")
    result, calls = script(path, *base_args, *args, REAL="1", **recording)
    assert result.returncode == 2
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line.startswith(error)
    assert calls == [] and not (tmp_path / "record.srun").exists()
    assert modules_run(tmp_path / "site") == ["torchtitan.experiments.tst"]


@pytest.mark.parametrize(
    ("task", "queued"),
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}, "5_3")],
    ids=["job", "task of an array"],
)
def test_a_job_that_has_stopped_is_queued_again(script, tmp_path, task, queued):
    if task:  # the configs of a sweep
        (tmp_path / "3.toml").touch()
        task = task | {"CONFIG_FILE": str(tmp_path)}
    result, calls = script("train.sbatch", EXIT_CODE="75", **task)
    assert result.returncode == -signal.SIGKILL
    assert calls[3:] == [f"scontrol requeue {queued}"]
    assert all(("/3.toml" in call) == bool(task) for call in calls[:3])


@pytest.mark.parametrize(("code", "state"), [(75, "CANCELLED"), (75, ""), (3, "RUNNING")])
def test_a_job_that_is_not_to_go_on_is_not_queued_again(script, code, state):
    result, calls = script("train.sbatch", EXIT_CODE=str(code), STATE=state)
    assert result.returncode == code
    assert [call.partition(":")[0] for call in calls[1:]] == ["node 0", "node 1"]


def test_a_chain_is_two_jobs(script, tmp_path):
    both = {"SBATCH_OPTIONS": "--nodes=2", "RECOVERY_ARGS": "--training.steps=9"}
    result, (first, second) = script("chain.sh", "--optimizer.lr=1", **both)
    assert result.returncode == 0
    train, job = f"{SLURM}/train.sbatch", f"--job.config_file {tmp_path}/job.toml --optimizer.lr=1"
    assert first.endswith(f"{train} --superposition.stop_at_boundary {job}")
    assert second.endswith(f"{train} {job} --training.steps=9")
    assert "--dependency=afterok:1 " in second
    assert all("--parsable --nodes=2 " in call for call in (first, second))


def test_a_chain_is_submitted_whole_or_not_at_all(script):
    result, calls = script("chain.sh", RECOVERY_OPTIONS="--partition=nowhere")
    assert result.returncode == 1
    assert calls[2:] == ["scancel 1"]


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with a job, a link to the repository next to it, and Slurm's copy of a script."""
    folder = tmp_path / "my jobs"
    folder.mkdir()
    (folder / "a job.toml").touch()
    (tmp_path / "the repository").symlink_to(ROOT)
    (tmp_path / "link.sbatch").symlink_to(SLURM / "train.sbatch")
    spool = tmp_path / "spool" / "job00007"
    spool.mkdir(parents=True)
    for name in ("train.sbatch", "tokenize.sbatch"):
        shutil.copy(SLURM / name, spool / name)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "{}/the repository/scripts/slurm/train.sbatch",
        "../the repository/scripts/slurm/train.sbatch",
        "{}/link.sbatch",
    ],
    ids=["absolute", "relative", "link"],
)
@pytest.mark.parametrize("args", [[], ["--job.description=two words", "--x=a/scripts/slurm/b"]])
def test_a_job_is_submitted_from_any_folder(script, elsewhere, command, args):
    command = " ".join([command.format(elsewhere.parent), *args])
    spool = elsewhere.parent / "spool" / "job00007" / "train.sbatch"
    result, calls = script(
        spool, *args, cwd=elsewhere, CONFIG_FILE="a job.toml", COMMAND=f"{command}\n   Command=x"
    )
    assert result.returncode == 0, result.stderr
    check, *launches = calls
    assert len(launches) == 2
    expected = " ".join([f"{elsewhere}/a job.toml", "--nproc=4 --nnodes=2", *args])
    assert check == f"tst check {expected}"
    expected = " ".join(["--job.config_file", f"{elsewhere}/a job.toml", *args])
    assert all(call.endswith(expected) for call in launches)


def test_a_copy_of_the_script_is_submitted_in_the_repository_only(script, elsewhere):
    spool = elsewhere.parent / "spool" / "job00007" / "train.sbatch"
    copied = {"COMMAND": f"{elsewhere}/copy.sbatch"}
    result, calls = script(spool, SLURM_SUBMIT_DIR=str(ROOT), **copied)
    assert (result.returncode, len(calls)) == (0, 3)
    result, calls = script(spool, SLURM_SUBMIT_DIR=str(elsewhere), **copied)  # sbatch --chdir
    assert (result.returncode, len(calls)) == (0, 3)
    result, calls = script(spool, cwd=elsewhere, **copied)
    assert (result.returncode, calls) == (2, [])
    assert result.stderr.splitlines() == [
        "Cannot find the repository: submit its own scripts/slurm/train.sbatch, not a copy"
    ]


def test_paths_of_tokenization_are_relative_to_the_folder_of_submission(script, elsewhere):
    command = f"{elsewhere.parent}/the repository/scripts/slurm/tokenize.sbatch"
    spool = elsewhere.parent / "spool" / "job00007" / "tokenize.sbatch"
    args = ["my corpus", "tokens", "--tokenizer=my tokenizer"]
    result, calls = script(spool, *args, cwd=elsewhere, COMMAND=" ".join([command, *args]))
    assert result.returncode == 0, result.stderr
    assert calls[0] == str(elsewhere)
    assert calls[1:] == ["tokenize", *args]


def test_all_scripts_look_for_the_repository_in_the_same_way():
    found = set()
    for name in BATCH_SCRIPTS:
        text = (SLURM / name).read_text()
        search = text[text.index("# Slurm runs a copy") : text.index('setup.sh"\n')]
        assert search.count(f"scripts/slurm/{name}") == 1
        found.add(search.replace(name, "NAME"))
    assert len(found) == 1


@pytest.mark.parametrize("path", ["train.sbatch", RUN_TRAIN], ids=["train.sbatch", "run_train.sh"])
@pytest.mark.parametrize("name", ["--job.config_file {}", "--job.config-file={}"])
@pytest.mark.parametrize("given", ["", "the same"])
def test_an_argument_names_the_job(script, tmp_path, path, name, given):
    job = tmp_path / "job.toml"
    names = name.format(job).split(" ")
    result, calls = script(path, "--first=1", *names, "--last", CONFIG_FILE=given and str(job))
    assert result.returncode == 0, result.stderr
    start, *launches = calls
    assert start.startswith(f"tst {'train' if path == RUN_TRAIN else 'check'} {job} --nproc=4 ")
    assert len(launches) == (0 if path == RUN_TRAIN else 2)
    assert all(call.endswith(f" --job.config_file {job} --first=1 --last") for call in launches)
    assert all(call.endswith(" --first=1 --last") for call in calls)
    assert not any("config-file" in call for call in calls)
    assert "config_file" not in start


@pytest.mark.parametrize("path", ["train.sbatch", RUN_TRAIN], ids=["train.sbatch", "run_train.sh"])
@pytest.mark.parametrize(
    ("config_file", "args", "message"),
    [
        ("{}/job.toml", ["--job.config_file={}/b.toml"], "CONFIG_FILE = {0}/job.toml and --job."),
        ("", ["--job.config_file={}/b", "--job.config-file", "{}/c"], "CONFIG_FILE = {0}/b and"),
        ("", ["--training.steps=2", "--job.config_file"], "--job.config_file: a file must follow"),
        ("{}/none/job.toml", [], "CONFIG_FILE = {0}/none/job.toml: no such file"),
        ("none.toml", [], f"CONFIG_FILE = none.toml: no such file. A path is relative to {ROOT}"),
    ],
)
def test_a_job_that_is_not_named_clearly(script, tmp_path, path, config_file, args, message):
    args = [arg.format(tmp_path) for arg in args]
    result, calls = script(path, *args, CONFIG_FILE=config_file.format(tmp_path))
    assert (result.returncode, calls) == (2, [])
    (line,) = result.stderr.splitlines()
    assert line.startswith(message.format(tmp_path))


def test_the_demo_is_known_by_any_path_of_the_repository(script, elsewhere):
    run_train = elsewhere.parent / "the repository" / "run_train.sh"
    result, (train, compare) = script(run_train, cwd=elsewhere, CONFIG_FILE="")
    assert result.returncode == 0, result.stderr
    assert "The demo runs on 4 processes" in result.stdout
    job = f"{ROOT}/train_configs/demo/tst.toml"
    options = f"--nproc=4 --log-rank=0 --module={TRAIN}"
    assert train == f"tst train {job} {options} --training.local_batch_size=16"
    assert compare == f"tst compare --job={job} --training.local_batch_size=16"


@pytest.mark.parametrize(("code", "mode"), [(75, ""), (2, ""), (0, "fake_backend")])
def test_a_demo_that_has_not_ended_is_not_compared(script, code, mode):
    result, calls = script(RUN_TRAIN, CONFIG_FILE="", EXIT_CODE=str(code), COMM_MODE=mode)
    assert result.returncode == code
    assert [call.split()[:2] for call in calls] == [["tst", "train"]]


def test_a_job_needs_its_config(script):
    result, calls = script("train.sbatch", CONFIG_FILE="")
    assert (result.returncode, calls) == (2, [])
    assert result.stderr.startswith("CONFIG_FILE is not set: ")
    assert "--job.config_file JOB.toml" in result.stderr


def test_an_array_needs_the_folder_of_a_sweep(script):
    result, calls = script("train.sbatch", SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_JOB_ID="5")
    assert (result.returncode, calls) == (2, [])
    assert "job.toml/3.toml: no such file" in result.stderr
    assert "name the folder of a sweep" in result.stderr


def test_nodes_get_the_environment_whatever_the_job_got(script, tmp_path):
    options = {"SRUN_OPTIONS": "--cpu-bind=none --comment='two  words' --constraint=a&b"}
    script("train.sbatch", SRUN_EXPORT_ENV="NIL", **options)
    given = ["--kill-on-bad-exit=0", "--cpu-bind=none", "--comment=two  words", "--constraint=a&b"]
    assert (tmp_path / "record.srun").read_text().splitlines() == [*given, "exports ALL"]


def test_an_empty_environment_gets_what_programs_need():
    script = f". {shlex.quote(str(SLURM / 'setup.sh'))}; exec env"
    result = subprocess.run(
        ["/usr/bin/env", "-i", "VIRTUAL_ENV=/my venv", "bash", "-euc", script],
        capture_output=True,
        text=True,
    )
    variables = dict(line.split("=", 1) for line in result.stdout.splitlines())
    assert variables["PATH"].startswith("/my venv/bin:/")
    assert variables["HOME"] == str(Path("~").expanduser())


def test_options_of_a_chain_may_hold_spaces(script, elsewhere):
    result, calls = script(
        f"{elsewhere.parent}/the repository/scripts/slurm/chain.sh",
        "--job.description=two words",
        cwd=elsewhere,
        SBATCH_OPTIONS="--output='my job.out'",
        RECOVERY_OPTIONS='--comment="a  b"',
        RECOVERY_ARGS="--job.dump_folder='another folder'",
    )
    assert result.returncode == 0, result.stderr
    first, second = map(shlex.split, calls)
    assert all("--output=my job.out" in call for call in (first, second))
    assert all("--job.description=two words" in call for call in (first, second))
    assert "--comment=a  b" in second and "--comment=a  b" not in first
    assert second[-1] == "--job.dump_folder=another folder"
    assert f"{SLURM}/train.sbatch" in first and f"{SLURM}/train.sbatch" in second


def test_an_open_quote_is_named(script):
    result, calls = script("chain.sh", SBATCH_OPTIONS="--output='my job.out")
    assert (result.returncode, calls) == (2, [])
    assert result.stderr == "--output='my job.out: a quote is not closed. Close it\n"
