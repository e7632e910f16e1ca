"""The entry point of a job on TorchTitan 0.3.

Run ``torchrun ... -m torchtitan.experiments.tst.titan03.train --job.config_file run.toml``.
"""

import sys

from torchtitan.tools.logging import logger

from torchtitan import train as upstream

from ..resilience.reporting import end_with, errors_in_one_line
from ..upstream.replaced import replaced
from .cpu import enable_cpu_if_alone
from .job import to_config
from .job_config import read
from .job_data import warn_of_documents
from .trainer import SuperpositionTrainer


class JobManager:
    """Upstream's config manager, for the TOML and the command line of a job."""

    def parse_args(self) -> SuperpositionTrainer.Config:
        """Return the config of the job.

        Raises:
            ConfigError: if the job cannot be read, or has no counterpart in TorchTitan 0.3.
        """
        job = read(sys.argv[1:])
        logger.info(f"Starting job: {job.job.description}")
        warn_of_documents(job)
        return to_config(job)


def main() -> None:
    """Run upstream's main with the config of a job."""
    enable_cpu_if_alone()
    with (
        errors_in_one_line("training stopped", end_with),
        replaced(upstream, "ConfigManager", JobManager),
    ):
        upstream.main()


if __name__ == "__main__":
    main()
