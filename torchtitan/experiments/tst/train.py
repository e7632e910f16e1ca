"""Entry point: ``torchrun ... -m torchtitan.experiments.tst.train --job.config_file run.toml``."""

from torchtitan import train as upstream

from .config.manager import SuperpositionConfigManager
from .resilience.reporting import end_with, errors_in_one_line
from .training.trainer import SuperpositionTrainer
from .upstream.cpu import enable_cpu_if_alone
from .upstream.replaced import replaced


def main() -> None:
    """Upstream's main with our sections in the config and our trainer in the loop.

    The sections are added here and not by ``job.custom_config_module``, which upstream's own entry
    point would accept from a TOML too and then ignore ``[superposition]`` without a word.
    """
    enable_cpu_if_alone()
    with (
        errors_in_one_line("training stopped", end_with),
        replaced(upstream, "ConfigManager", SuperpositionConfigManager),
    ):
        upstream.main(SuperpositionTrainer)


if __name__ == "__main__":
    main()
