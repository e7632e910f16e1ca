"""The batch scripts on a real Slurm of two nodes, started for this: `scripts/slurm/try.sh`."""

import csv
import sys
from pathlib import Path

import pytest
import torch

import slurm_cluster
from jobs import load_full
from launches import wait_until
from slurm_cluster import DEMO, SHORTER, TRAIN, ends_well, output, steps_done, wait_for_step
from torchtitan.experiments.tst.data.shards.token_shards import TokenShards
from torchtitan.experiments.tst.metrics_file import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"Slurm {slurm_cluster.missing()}"),
]

TST = [sys.executable, "-m", "torchtitan.experiments.tst"]
SHORT = ["--training.steps=200", "--validation.freq=100", "--metrics.log_freq=1"]
BOUNDARY = 60


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs of jobs")


@pytest.fixture(scope="module")
def submit(cluster, outputs):
    """Submit a short demo on two nodes; gives the job's number and its run folder."""

    def run(name: str, *options: str, args: list[str] | None = None) -> tuple[str, Path]:
        folder = outputs / name
        command = ["sbatch", "--parsable", f"--output={folder}.out", "--nodes=2", *options, TRAIN]
        command += [*(args or SHORT), f"--job.dump_folder={folder}"]
        return cluster.run(*command, CONFIG_FILE=DEMO), folder

    return run


@pytest.fixture(scope="module")
def undisturbed(cluster, submit) -> Path:
    job, folder = submit("undisturbed")
    ends_well(cluster, job, folder)
    return folder


def assert_same_run(folder: Path, undisturbed: Path, steps: int = 200) -> None:
    """Every step's loss, each step done once, and the last checkpoint, bit for bit."""
    assert steps_done(folder) == list(range(1, steps + 1))
    runs = [
        {m["step"]: m["loss_metrics/global_avg_loss"] for m in read_metrics(run) if "lr" in m}
        for run in (folder, undisturbed)
    ]
    assert list(runs[1]) == list(range(1, steps + 1))
    assert runs[0] == runs[1]
    states = [load_full(run / "checkpoint" / f"step-{steps}") for run in (folder, undisturbed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_nodes_train_and_a_signal_queues_the_job_again(cluster, submit):
    job, folder = submit("signalled", args=SHORTER)
    wait_for_step(cluster, job, folder, 3)
    cluster.run("scancel", "--signal=USR1", job)
    ends_well(cluster, job, folder)
    log = output(folder)
    assert "on n[1-2], 1 processes each" in log and "dp_shard=2" in log
    assert log.count("tst.toml: all checks passed\n") == 2, "before each start"
    assert "requeueing the job" in log and f"Job {job}, start 2:" in log
    assert log.count("step: 40 ") == 2, "training and validation, of the first node alone"
    assert steps_done(folder) == list(range(1, 41))


def test_a_signalled_job_is_the_undisturbed_one(cluster, submit, undisturbed):
    job, folder = submit("like-undisturbed")
    wait_for_step(cluster, job, folder, BOUNDARY // 2)
    cluster.run("scancel", "--signal=USR1", job)
    ends_well(cluster, job, folder)
    assert_same_run(folder, undisturbed)


def test_recovery_is_a_second_job(cluster, outputs, undisturbed):
    """And the first one is queued again once: the second goes on waiting."""
    folder = outputs / "chain"
    options = f"--output='{folder}.out' --nodes=2"
    jobs = cluster.run(
        *("scripts/slurm/chain.sh", *SHORT, f"--job.dump_folder={folder}"),
        CONFIG_FILE=DEMO,
        SBATCH_OPTIONS=options,
    ).split()
    wait_for_step(cluster, jobs[0], folder, BOUNDARY // 2)
    cluster.run("scancel", "--signal=USR1", jobs[0])
    for job in jobs:
        ends_well(cluster, job, folder)
        last = read_metrics(folder)[-1]["step"]
        assert last == (BOUNDARY if job == jobs[0] else 200)
    assert f"Job {jobs[0]}, start 2:" in output(folder)
    assert_same_run(folder, undisturbed)


def test_the_second_job_of_a_chain_goes_with_the_first(cluster, outputs):
    folder = outputs / "failing"
    jobs = cluster.run(
        *("scripts/slurm/chain.sh", "--training.seq_len=0", f"--job.dump_folder={folder}"),
        CONFIG_FILE=DEMO,
        SBATCH_OPTIONS=f"--output='{folder}.out' --nodes=2",
    ).split()
    assert cluster.wait_for(jobs[0], "FAILED", "COMPLETED") == "FAILED"
    (line,) = output(folder).splitlines()  # of two nodes, none of which starts
    assert line.startswith("config error: training.seq_len = 0: must be")
    assert cluster.wait_for(jobs[1], "CANCELLED", "FAILED", "COMPLETED") == "CANCELLED"


def test_a_time_limit_queues_the_job_again(cluster, submit, undisturbed):
    # Slurm looks at limits every half minute and sends the signal up to a minute early: the limit
    # is brought near once the job trains, and there is work for a minute
    job, folder = submit("limited", "--time=60", args=[*SHORT, "--checkpoint.interval=1"])
    wait_for_step(cluster, job, folder, 1)
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+330")  # it is signalled at 300
    wait_until(lambda: "requeueing the job" in output(folder))
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    ends_well(cluster, job, folder)
    log = output(folder)
    assert log.count("requeueing the job") == 1 and f"Job {job}, start 2:" in log
    assert_same_run(folder, undisturbed)


def test_a_preempted_job_goes_on(cluster, submit, undisturbed):
    job, folder = submit("preempted")
    wait_for_step(cluster, job, folder, BOUNDARY // 2)
    cluster.run("srun", "--partition=urgent", "--nodes=2", "--ntasks=4", "true")
    ends_well(cluster, job, folder)
    assert f"Job {job}, start 2:" in output(folder)
    assert_same_run(folder, undisturbed)


def test_a_cancelled_job_stays_cancelled(cluster, submit):
    job, folder = submit("cancelled")
    wait_for_step(cluster, job, folder, 5)
    cluster.run("scancel", job)
    assert cluster.wait_for(job, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    assert "start 2" not in output(folder)


def test_a_sweep_as_an_array_fills_its_table(cluster, outputs):
    folder = outputs / "sweep"
    steps = ["--training.steps=20", "--validation.freq=10", "--metrics.log_freq=5"]
    make = [*TST, "sweep", "make", str(folder), DEMO, *steps]
    for key, values in {"bag_size": "1,2,4", "step_ratio": "0.3"}.items():
        make += ["--vary", f"superposition.{key}={values}"]
    *_, command = cluster.run(*make).splitlines()
    options = f"sbatch --parsable --output='{folder}/%a.out' "
    job = cluster.run("bash", "-c", command.replace("sbatch ", options))
    cluster.wait_for(job, "COMPLETED", "FAILED", seconds=400)
    table = cluster.run(*TST, "sweep", "table", str(folder))
    assert "3 of 3 runs finished" in table
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["superposition.bag_size"] for row in rows] == ["", "2", "4"]
    assert all(row["step"] == "20" and float(row["validation_loss"]) > 0 for row in rows)
    assert len({row["validation_loss"] for row in rows}) == 3
    assert (folder / "losses.png").stat().st_size > 10_000


def test_a_task_of_an_array_is_queued_again_alone(cluster, outputs):
    """Also the last one, whose job has the number of the whole array."""
    folder = outputs / "array"
    make = [*TST, "sweep", "make", str(folder), DEMO, *SHORT]
    cluster.run(*make, "--vary", "superposition.bag_size=2,4")
    options = ["--parsable", f"--output={folder}/%a.out", "--array=0-1"]
    array = cluster.run("sbatch", *options, TRAIN, CONFIG_FILE=str(folder))
    last, run = f"{array}_1", folder / "runs" / "bag_size=4"
    wait_for_step(cluster, last, run, 5)
    cluster.run("scancel", "--signal=USR1", last)
    cluster.wait_for(array, "COMPLETED", "FAILED", seconds=400)
    logs = [(folder / f"{number}.out").read_text() for number in (0, 1)]
    assert ["start 2:" in log for log in logs] == [False, True]
    assert [cluster.state(f"{array}_{number}") for number in (0, 1)] == ["COMPLETED"] * 2
    assert read_metrics(run)[-1]["step"] == 200


def test_a_chain_is_submitted_whole_or_not_at_all(cluster, outputs):
    before = cluster.run("squeue", "--noheader", "--format=%i")
    with pytest.raises(AssertionError, match="nowhere"):
        cluster.run(
            "scripts/slurm/chain.sh",
            CONFIG_FILE=DEMO,
            SBATCH_OPTIONS=f"--begin=now+1hour --output='{outputs}/chain-not.out'",
            RECOVERY_OPTIONS="--partition=nowhere",
        )
    assert cluster.run("squeue", "--noheader", "--format=%i") == before


def test_tokenization_goes_on_after_a_time_limit(cluster, outputs, corpus):
    folder = outputs / "tokens"
    job = cluster.run(
        *("sbatch", "--parsable", f"--output={folder}.out", "--cpus-per-task=2"),
        *("scripts/slurm/tokenize.sbatch", str(corpus / "train.jsonl"), str(folder)),
        f"--tokenizer={corpus / 'tokenizer'}",
    )
    wait_until(folder.exists)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    ends_well(cluster, job, folder)
    assert "requeueing the job" in output(folder)
    assert TokenShards(str(folder), None).tokens > 400_000
    assert "is complete" in output(folder)
