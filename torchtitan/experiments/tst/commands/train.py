"""Train a job on this machine: check it, then start a process for each GPU.

    tst train train_configs/debug/llama3.toml
    tst train JOB.toml --nproc 8 --training.steps=100

SIGTERM and SIGUSR1 end a job between two steps, with a checkpoint and exit code 75: started again
with the same command, it resumes. Further arguments are the job's, over the TOML;
python -m torchtitan.experiments.tst.train --help explains every key.
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
        overrides: the job's arguments.
        job: its TOML.
        nproc: Processes to start, or ranks to play with --comm.mode=fake_backend. By default one
            for each GPU, or 2 on CPU.
        log_rank: Ranks whose output is shown, such as 0,1.
        module: What each process runs. The job of another one is not checked.
    """
    check_positive(nproc=nproc)
    start(job_arguments(job, overrides), nproc or default_processes(), log_rank, module)
