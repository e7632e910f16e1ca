"""Train a job on this machine: check it, then start one process per GPU.

    tst train train_configs/debug/llama3.toml
    tst train JOB.toml --nproc 8 --training.steps=100

SIGTERM and SIGUSR1 stop a job between two steps, with a checkpoint and exit code 75. Run the same
command again to resume. (On TorchTitan 0.3 there is no such checkpoint.) Further arguments override
the TOML. For a list of all keys, run
python -m torchtitan.experiments.tst.train --help
"""

from typing import Annotated

from tyro.conf import arg

from ..engine import Engine, check_engine, start_module
from ..launch import default_processes
from .arguments import Job, check_positive, job_arguments


def main(
    overrides: list[str],
    job: Job,
    /,
    nproc: Annotated[int | None, arg(metavar="N")] = None,
    log_rank: str = "0",
    module: str | None = None,
    engine: Engine | None = None,
) -> None:
    """Train a job.

    Args:
        overrides: Arguments of the job.
        job: The job's TOML file.
        nproc: Number of processes, or of simulated ranks with
            --comm.mode=fake_backend.
            By default one for each GPU, or 2 on CPU.
        log_rank: Ranks whose output is shown, such as 0,1.
        module: Module that each process runs, instead of that of this package.
            The job is then not checked.
        engine: TorchTitan that must be installed, 0.2 or 0.3.
    """
    check_positive(nproc=nproc)
    check_engine(engine)
    of_engine = start_module()
    processes, module = nproc or default_processes(), module or of_engine.TRAIN_MODULE
    of_engine.start(job_arguments(job, overrides), processes, log_rank, module)
