"""Check that a job can start: config, tokenizer, data, checkpoints, machine.

    tst check JOB.toml
    tst check JOB.toml --ranks 64 --training.local_batch_size=8

Reads the config, the tokenizer, the data and the checkpoints, and checks that this machine has what
the job needs. `tst train` starts with the same checks. If the job reads the demo's corpus, the
corpus is made first. Further arguments override the TOML.
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
        overrides: Arguments of the job.
        job: The job's TOML file.
        ranks: Number of GPUs of another cluster. This machine is then not checked.
        nproc: Processes on this machine. By default one for each GPU, or 2 on CPU.
        nnodes: Number of machines like this one. By default 1.
        files: Check tokenizer, data, folders and checkpoints.
    """
    check_positive(ranks=ranks, nproc=nproc, nnodes=nnodes)
    if ranks and (nproc or nnodes):
        raise ArgumentError(
            "--ranks is for another cluster, --nproc and --nnodes are for machines like this one; "
            "give one of the two"
        )
    check_processes(nproc or 1)
    config = SuperpositionConfigManager().parse_args(job_arguments(job, overrides))
    processes = ranks or (nnodes or 1) * (nproc or default_processes())
    lines = check(config, processes, machine=ranks is None, files=files)
    print("\n  ".join([f"{job}: all checks passed", *lines]))
