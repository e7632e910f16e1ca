"""Jobs under sbatch --export, from another folder, with spaces, on a real Slurm of two nodes."""

import os
import shutil
import sysconfig
import venv
from pathlib import Path

import pytest

import slurm_cluster
from jobs import ROOT
from slurm_cluster import DEMO, SHORTER, TRAIN, ends_well, output, steps_done, wait_for_step
from torchtitan.experiments.tst.data.shards.token_shards import TokenShards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"Slurm {slurm_cluster.missing()}"),
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of the repository, with a .venv that has the packages of this environment."""
    folder = tmp_path_factory.mktemp("copy") / "the repository"
    hidden = shutil.ignore_patterns("__pycache__")
    for name in ("scripts", "torchtitan", "train_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=hidden)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("outputs/demo", "outputs"):
        (ROOT / name).mkdir(parents=True, exist_ok=True)
    (folder / "outputs").mkdir()
    (folder / "outputs" / "demo").symlink_to(ROOT / "outputs" / "demo")
    venv.create(folder / ".venv", symlinks=True)
    (site,) = (folder / ".venv" / "lib").glob("python*/site-packages")
    packages = sysconfig.get_path("purelib")
    (site / "packages.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    (folder / ".venv" / ".installed-demo").touch()
    return folder


@pytest.fixture(scope="module")
def elsewhere(cluster, tmp_path_factory) -> slurm_cluster.Cluster:
    """The cluster with another folder to submit in, which has a job."""
    folder = tmp_path_factory.mktemp("jobs of mine")
    shutil.copy(ROOT / DEMO, folder / "a job.toml")
    return slurm_cluster.Cluster(cluster.environment, folder)


def test_a_job_that_names_its_variables_is_queued_again(elsewhere, repository):
    """With --export=NAME=VALUE, which keeps PATH, HOME and all others from the job."""
    folder = repository / "outputs" / "a run"  # paths of the job are relative to the repository
    variables = "CONFIG_FILE=a job.toml,NGPU=1,SRUN_OPTIONS=--label"
    command = ["sbatch", "--parsable", f"--output={folder}.out", "--nodes=2"]
    command += [f"--export={variables}", str(repository / TRAIN), *SHORTER]
    job = elsewhere.run(*command, "--job.dump_folder=outputs/a run")
    wait_for_step(elsewhere, job, folder, 3)
    elsewhere.run("scancel", "--signal=USR1", job)
    ends_well(elsewhere, job, folder)
    log = output(folder)
    assert f"start 2: {elsewhere.directory}/a job.toml on n[1-2], 1 processes each" in log
    assert "\n0: [rank0]:" in log, "labelled, as SRUN_OPTIONS says"
    assert steps_done(folder) == list(range(1, 41))


def test_jobs_under_other_exports_train(elsewhere, repository):
    steps = ["--training.steps=6", "--validation.freq=6", "--metrics.log_freq=1"]
    steps += ["--training.local_batch_size=16"]  # 64 is a batch of up to 4 processes
    named = [*steps, "--job.config-file", "a job.toml"]
    relative = os.path.relpath(repository / TRAIN, elsewhere.directory)
    jobs = {}
    for name, options, script, args, variables in (
        ("none", ["--export=NONE", "--nodes=2"], str(repository / TRAIN), named, {}),
        ("of the environment", [], relative, named, {"SBATCH_EXPORT": "NIL"}),
        (
            "all",
            ["--export=ALL,LOG_RANK=-1"],
            str(repository / TRAIN),
            steps,
            {"CONFIG_FILE": "a job.toml", "TRAIN_FILE": "torchtitan.experiments.tst.train"},
        ),
    ):
        folder = repository / "outputs" / name
        command = ["sbatch", "--parsable", f"--output={folder}.out", *options, script]
        job = elsewhere.run(*command, *args, f"--job.dump_folder=outputs/{name}", **variables)
        jobs[job] = folder
    for job, folder in jobs.items():
        ends_well(elsewhere, job, folder)
        assert steps_done(folder) == list(range(1, 7))
        assert ("step:  6" in output(folder)) == (folder.name != "all"), "LOG_RANK=-1 shows none"
    assert "on n[1-2], 2 processes each" in output(repository / "outputs" / "none")


def test_tokenization_under_export_in_another_folder(elsewhere, repository, corpus):
    (elsewhere.directory / "my corpus").symlink_to(corpus)
    folder = elsewhere.directory / "my tokens"
    script = str(repository / "scripts" / "slurm" / "tokenize.sbatch")
    command = ["sbatch", "--parsable", f"--output={folder}.out", "--export=NONE", script]
    command += ["my corpus/train.jsonl", "my tokens", "--tokenizer=my corpus/tokenizer"]
    ends_well(elsewhere, elsewhere.run(*command), folder)
    assert TokenShards(str(folder), None).tokens > 400_000


def test_a_lost_script_says_what_to_do(elsewhere):
    shutil.copy(ROOT / TRAIN, elsewhere.directory / "copy.sbatch")
    folder = elsewhere.directory / "lost"
    job = elsewhere.run("sbatch", "--parsable", f"--output={folder}.out", "copy.sbatch")
    assert elsewhere.wait_for(job, "FAILED", "COMPLETED") == "FAILED"
    (line,) = output(folder).splitlines()
    assert line.startswith("Cannot find the repository: submit its own scripts/slurm/train.sbatch")
