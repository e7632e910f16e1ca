"""Train a job on this machine: check it, then start one process per GPU.

    tst train train_configs/debug/llama3.toml
    tst train JOB.toml --nproc 8 --training.steps=100

SIGTERM and SIGUSR1 stop a job between two steps, with a checkpoint and exit code 75. Run the same
command again to resume. Further arguments override the TOML. For a list of all keys, run
python -m torchtitan.experiments.tst.train --help
"""

from typing import Annotated

from tyro.conf import arg

from ..start import TRAIN_MODULE, default_processes, start
from .arguments import Job, check_positive, job_arguments


def main(
    overrides: list[str],
    job: Job,
    /,
    nproc: Annotated[int | None, arg(metavar="N")] = None,
    log_rank: str = "0",
    module: str = TRAIN_MODULE,
) -> None:
    """Train a job.

    Args:
        overrides: Arguments of the job.
        job: The job's TOML file.
        nproc: Number of processes, or of simulated ranks with
            --comm.mode=fake_backend.
            By default one for each GPU, or 2 on CPU.
        log_rank: Ranks whose output is shown, such as 0,1.
        module: Module that each process runs.
            With another module, the job is not checked.
    """
    check_positive(nproc=nproc)
    start(job_arguments(job, overrides), nproc or default_processes(), log_rank, module)
