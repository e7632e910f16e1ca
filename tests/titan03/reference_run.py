"""Trains jobs with TorchTitan 0.2.2, for test_engines.py: ``CORPUS FOLDER MODEL PROCESSES ...``.

``FOLDER/weights-MODEL`` gets the first weights in Hugging Face's format, and
``FOLDER/MODEL-PROCESSES`` is the folder of the run from them.
"""

import sys
from pathlib import Path

import jobs_of_both

from launches import fork
from torchtitan.experiments.tst.results.export import export, read_job

TRAIN = "torchtitan.experiments.tst.train"


def main() -> None:
    """Train each model on each number of processes."""
    corpus, folder = map(Path, sys.argv[1:3])
    for model, processes in zip(sys.argv[3::2], sys.argv[4::2], strict=True):
        weights = folder / f"weights-{model}"
        if not weights.exists():
            seed = folder / f"seed-{model}"
            args = [*jobs_of_both.args(corpus, model), f"--job.dump_folder={seed}"]
            _run([*args, *jobs_of_both.ONLY_WEIGHTS], 1, folder)
            export(seed / "checkpoint/step-0", weights, read_job(seed / "checkpoint/step-0", args))
        run = folder / f"{model}-{processes}"
        args = jobs_of_both.args(corpus, model, weights, int(processes))
        _run([*args, f"--job.dump_folder={run}"], int(processes), folder)


def _run(args: list[str], processes: int, folder: Path) -> None:
    launch = fork(TRAIN, args, processes, folder)
    if launch.failed:
        sys.exit(launch.output)


if __name__ == "__main__":
    main()
