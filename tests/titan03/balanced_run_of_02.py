"""Trains a job with an auxiliary loss with TorchTitan 0.2.2: ``CORPUS FOLDER ARGUMENT ...``.

``FOLDER/weights`` gets the first weights in Hugging Face's format; ``FOLDER/run`` is the run.
"""

import sys
from pathlib import Path

import jobs_of_both
import reference_run

from torchtitan.experiments.tst.results.export import export, read_job


def main() -> None:
    """Make the first weights and train from them."""
    corpus, folder = map(Path, sys.argv[1:3])
    more = sys.argv[3:]
    args = [*jobs_of_both.args(corpus, "qwen3_moe"), *more, f"--job.dump_folder={folder / 'seed'}"]
    reference_run._run([*args, *jobs_of_both.ONLY_WEIGHTS], 1, folder)
    seed = folder / "seed/checkpoint/step-0"
    export(seed, folder / "weights", read_job(seed, args))
    args = [*jobs_of_both.args(corpus, "qwen3_moe", folder / "weights"), *more]
    reference_run._run([*args, f"--job.dump_folder={folder / 'run'}"], 1, folder)


if __name__ == "__main__":
    main()
