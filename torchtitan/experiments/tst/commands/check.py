"""Check everything that would stop a job, without starting it.

    tst check JOB.toml
    tst check JOB.toml --ranks 64 --training.local_batch_size=8

Reads the config, the tokenizer, the data and the checkpoints, and asks this machine for what the
job needs. Each launch begins with it. For a job that reads the demo's corpus, it makes that first.
Further arguments are the job's, over the TOML.
"""

from typing import Annotated

from tyro.conf import arg

from ..config.manager import SuperpositionConfigManager
from ..errors import ArgumentError
from ..start import check, check_processes, default_processes
from .arguments import Job, check_positive, job_arguments


def main(
    overrides: list[str],
    job: Job,
    /,
    ranks: Annotated[int | None, arg(metavar="N")] = None,
    nproc: Annotated[int | None, arg(metavar="N")] = None,
    nnodes: Annotated[int | None, arg(metavar="N")] = None,
    files: bool = True,
) -> None:
    """Check a job.

    Args:
        overrides: the job's arguments.
        job: its TOML.
        ranks: Check for so many GPUs of a cluster that is not here: this machine is not asked.
        nproc: Processes on this machine. By default one for each GPU, or 2 on CPU.
        nnodes: Machines like this one. By default 1.
        files: Look at tokenizer, data, folders and checkpoints.
    """
    check_positive(ranks=ranks, nproc=nproc, nnodes=nnodes)
    if ranks and (nproc or nnodes):
        raise ArgumentError(
            "--ranks is for a cluster elsewhere, --nproc and --nnodes for one like this"
        )
    check_processes(nproc or 1)
    config = SuperpositionConfigManager().parse_args(job_arguments(job, overrides))
    processes = ranks or (nnodes or 1) * (nproc or default_processes())
    lines = check(config, processes, machine=ranks is None, files=files)
    print("\n  ".join([f"{job}: all checks passed", *lines]))
