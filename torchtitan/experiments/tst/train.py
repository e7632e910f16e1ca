"""Entry point: ``torchrun ... -m torchtitan.experiments.tst.train --job.config_file run.toml``."""

from .device import enable_cpu_if_alone

enable_cpu_if_alone()  # before anything of upstream's that asks for the device

from torchtitan import train as upstream  # noqa: E402

from . import models  # noqa: E402, F401
from .checkpoint.files import CheckpointError  # noqa: E402
from .config.errors import ConfigError  # noqa: E402
from .data import datasets  # noqa: E402, F401
from .data.records import DataError  # noqa: E402
from .job_config import SuperpositionConfigManager  # noqa: E402
from .reporting import end_with  # noqa: E402
from .step_check import NonFiniteError  # noqa: E402
from .trainer import SuperpositionTrainer  # noqa: E402


def main() -> None:
    """Upstream's main with our section in the config and our trainer in the loop.

    The section is added here and not by ``job.custom_config_module``, which upstream's own entry
    point would accept from a TOML too and then ignore ``[superposition]`` without a word.
    """
    upstream.ConfigManager = SuperpositionConfigManager  # type: ignore[misc]
    try:
        upstream.main(SuperpositionTrainer)
    except ConfigError as error:
        end_with(f"config error: {error}")
    except CheckpointError as error:
        end_with(f"checkpoint error: {error}")
    except (DataError, NonFiniteError, OSError) as error:
        end_with(f"training stopped: {error}")


if __name__ == "__main__":
    main()
