"""The entry point of training.

Run ``torchrun ... -m torchtitan.experiments.tst.train --job.config_file run.toml``.
"""

from torchtitan import train as upstream

from .config.manager import SuperpositionConfigManager
from .resilience.reporting import end_with, errors_in_one_line
from .training.trainer import SuperpositionTrainer
from .upstream.cpu import enable_cpu_if_alone
from .upstream.replaced import replaced


def main() -> None:
    """Run upstream's main with our config sections and our trainer.

    ``job.custom_config_module`` could add the sections, too. But upstream's own entry point would
    then accept such a TOML, and silently ignore ``[superposition]``.
    """
    enable_cpu_if_alone()
    with (
        errors_in_one_line("training stopped", end_with),
        replaced(upstream, "ConfigManager", SuperpositionConfigManager),
    ):
        upstream.main(SuperpositionTrainer)


if __name__ == "__main__":
    main()
