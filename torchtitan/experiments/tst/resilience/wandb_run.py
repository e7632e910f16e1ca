"""Log all launches of a job to one run of Weights & Biases.

Upstream's logger passes ``WANDB_RUN_ID`` on, and W&B itself reads ``WANDB_RESUME``. The ID is kept
in the run folder. A launch that resumes from one of the job's checkpoints continues its W&B run.
Any other launch starts a new one, because unrelated jobs may share a run folder.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan.components.checkpoint import TRAIN_STATE
from torchtitan.config import JobConfig

from ..upstream.replaced import replaced_items
from .checkpoint import inventory

ID_FILE = "wandb_run_id"
_ID, _RESUME = "WANDB_RUN_ID", "WANDB_RESUME"
_USERS_CHOICE = ("WANDB_RESUME_FROM", "WANDB_FORK_FROM")  # they exclude WANDB_RESUME


@contextmanager
def wandb_run(job_config: JobConfig, rank: int, metrics_rank: int) -> Iterator[None]:
    """Let W&B's ``init`` in this context start or continue the job's run.

    Values that the user has set in the environment are kept. With ``metrics.save_for_all_ranks``,
    each rank has its own run.

    Args:
        job_config: the job's config.
        rank: rank of this process.
        metrics_rank: the rank that logs if only one does.
    """
    metrics = job_config.metrics
    logs = metrics.enable_wandb and (metrics.save_for_all_ranks or rank == metrics_rank)
    if not logs or any(os.environ.get(name) for name in _USERS_CHOICE):
        yield
        return
    suffix = "" if rank == metrics_rank else f"-rank-{rank}"
    file = Path(job_config.job.dump_folder, ID_FILE + suffix)
    resumes = _resumes(job_config)
    if run_id := os.environ.get(_ID, ""):
        run_id += suffix
    elif resumes and file.is_file():
        run_id = file.read_text().strip()
    run_id = run_id or secrets.token_hex(4)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{run_id}\n")
    values = {_ID: run_id}
    if resumes and not os.environ.get(_RESUME):
        values[_RESUME] = "allow"
    with replaced_items(os.environ, values):
        yield


@contextmanager
def wandb_evaluation(run: Path) -> Iterator[None]:
    """Let W&B's ``init`` in this context start or continue the evaluations of a training run.

    They are a W&B run of their own, because only one process at a time can write to a W&B run. Its
    ID is that of the training run and "-evaluation".

    Args:
        run: folder of the training run.
    """
    file = run / ID_FILE
    training = os.environ.get(_ID) or (file.read_text().strip() if file.is_file() else run.name)
    name = os.environ.get("WANDB_RUN_NAME") or training
    values = {
        _ID: f"{training}-evaluation",
        _RESUME: "allow",
        "WANDB_RUN_NAME": f"{name} evaluation",
        "WANDB_RUN_JOB_TYPE": "evaluation",
    }
    with replaced_items(os.environ, values):
        for variable in _USERS_CHOICE:  # these are for the training run
            os.environ.pop(variable, None)
        yield


def _resumes(job_config: JobConfig) -> bool:
    """Return whether the launch resumes from the job's newest checkpoint.

    A launch from an older one does not continue the W&B run, because W&B ignores steps that the run
    already has.
    """
    config = job_config.checkpoint
    if not config.enable or TRAIN_STATE in config.exclude_from_loading:
        return False
    folder = Path(job_config.job.dump_folder, config.folder)
    if config.load_step != -1:
        steps = inventory.complete_steps(folder)
        return bool(steps) and config.load_step == steps[-1] > 0
    found = inventory.list_checkpoints(folder)
    point = inventory.resume_point(found, job_config.training.steps)
    return point is not None and point.step > 0  # a run that has ended has nothing left to log
