"""Check that a job can start: config, tokenizer, data, checkpoints, machine.

    tst check JOB.toml
    tst check JOB.toml --ranks 64 --training.local_batch_size=8

Reads the config, the tokenizer, the data and the checkpoints, and checks that this machine has what
the job needs. `tst train` starts with the same checks. If the job reads the demo's corpus, the
corpus is made first. Further arguments override the TOML.
"""

from typing import Annotated

from tyro.conf import arg

from ..engine import Engine, check_engine, start_module
from ..errors import ArgumentError
from ..launch import check_processes, default_processes
from .arguments import Job, check_positive, job_arguments


def main(
    overrides: list[str],
    job: Job,
    /,
    ranks: Annotated[int | None, arg(metavar="N")] = None,
    nproc: Annotated[int | None, arg(metavar="N")] = None,
    nnodes: Annotated[int | None, arg(metavar="N")] = None,
    files: bool = True,
    engine: Engine | None = None,
) -> None:
    """Check a job.

    Args:
        overrides: Arguments of the job.
        job: The job's TOML file.
        ranks: Number of GPUs of another cluster. This machine is then not checked.
        nproc: Processes on this machine. By default one for each GPU, or 2 on CPU.
        nnodes: Number of machines like this one. By default 1.
        files: Check tokenizer, data, folders and checkpoints.
        engine: TorchTitan that must be installed, 0.2 or 0.3.
    """
    check_positive(ranks=ranks, nproc=nproc, nnodes=nnodes)
    if ranks and (nproc or nnodes):
        raise ArgumentError(
            "--ranks is for another cluster, --nproc and --nnodes are for machines like this one; "
            "give one of the two"
        )
    check_engine(engine)
    check_processes(nproc or 1)
    of_engine = start_module()
    config = of_engine.read(job_arguments(job, overrides))
    processes = ranks or (nnodes or 1) * (nproc or default_processes())
    lines = of_engine.check(config, processes, machine=ranks is None, files=files)
    print("\n  ".join([f"{job}: all checks passed", *lines]))
