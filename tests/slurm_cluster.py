"""A throwaway Slurm cluster of two nodes on this machine, and the jobs that tests run on it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL

from launches import wait_until
from torchtitan.experiments.tst.metrics_file import read_metrics

TRAIN = "scripts/slurm/train.sbatch"
DEMO = "train_configs/demo/tst.toml"
SHORTER = ["--training.steps=40", "--validation.freq=20", "--metrics.log_freq=1"]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")

CONFIG = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=2
PartitionName=ordinary Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


def missing() -> str:
    """What keeps the cluster from starting here; "" if nothing does."""
    if absent := [program for program in PROGRAMS if not shutil.which(program, path=_path())]:
        return f"needs {', '.join(absent)}: apt-get install slurm-wlm munge"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return "needs a host name that resolves"
    return "" if os.geteuid() == 0 else "needs root"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for s in sockets:
            s.bind(("localhost", 0))
        return [s.getsockname()[1] for s in sockets]


class Cluster:
    """Commands of a cluster that is running.

    Attributes:
        environment: in which Slurm's commands find it.
    """

    def __init__(self, environment: dict[str, str], directory: Path):
        self.environment, self.directory = environment, directory

    def run(self, *command: str, **environment: str) -> str:
        """Standard output of a command that succeeds."""
        result = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job, such as RUNNING; of an array, the states of its tasks."""
        return self.run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}")

    def wait_for(self, job: str, *states: str, seconds: float = 240) -> str:
        """The state of a job once all its tasks are in one of ``states``."""
        end = time.monotonic() + seconds
        while not (found := set(self.state(job).split())) <= set(states) or not found:
            assert time.monotonic() < end, f"job {job} is {found}, not {states}"
            time.sleep(0.5)
        return found.pop()


@contextlib.contextmanager
def cluster(folder: Path, directory: Path) -> Iterator[Cluster]:
    """Two nodes, n1 and n2, that run jobs as this user; stopped at the end.

    Args:
        folder: for the cluster's state and logs.
        directory: where commands run.
    """
    folder.chmod(0o755)
    host = socket.gethostname().partition(".")[0]
    ports = dict(zip(("ctld_port", "port_1", "port_2"), _free_ports(3), strict=True))
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, host=host, **ports))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": _path()}
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file")]
    munge += [f"--key-file={folder}/munge.key", f"--seed-file={folder}/munge.seed", "--foreground"]
    running = Cluster(environment, directory)

    def answers() -> bool:
        command = ["scontrol", "ping"]
        return (
            "UP" in subprocess.run(command, env=environment, capture_output=True, text=True).stdout
        )

    def idle() -> bool:
        nodes = running.run("sinfo", "-h", "-N", "-o", "%T", "-p", "ordinary")
        return nodes.split() == ["idle"] * 2

    daemons = [
        (["munged", "--force", *munge], (folder / "munge.socket").exists),
        (["slurmctld", "-D"], answers),
        (["slurmd", "-D", "-N", "n1"], answers),
        (["slurmd", "-D", "-N", "n2"], idle),
    ]
    with contextlib.ExitStack() as stack:
        for daemon, is_up in daemons:
            process = subprocess.Popen(daemon, env=environment, stdout=DEVNULL, stderr=DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            wait_until(is_up)
        try:
            yield running
        finally:
            subprocess.run(["scancel", "--user=root"], env=environment)
            wait_until(lambda: not running.run("squeue", "--noheader"))


def ends_well(cluster: Cluster, job: str, folder: Path) -> None:
    """Wait for a job's end, and show its output if it fails."""
    state = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert state == "COMPLETED", output(folder)[-6000:]


def output(folder: Path) -> str:
    """What the job of a run folder has printed."""
    return Path(f"{folder}.out").read_text()


def wait_for_step(cluster: Cluster, job: str, folder: Path, step: int) -> None:
    """Wait until a job that is at work has logged a step."""
    end = time.monotonic() + 240
    while not (
        (folder / "metrics.jsonl").exists() and any(m["step"] >= step for m in read_metrics(folder))
    ):
        assert time.monotonic() < end and cluster.state(job) in ("PENDING", "RUNNING"), output(
            folder
        )[-6000:]
        time.sleep(0.2)


def steps_done(folder: Path) -> list[int]:
    """Steps in the order in which they were trained, also those that were trained twice."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "lr" in line]
