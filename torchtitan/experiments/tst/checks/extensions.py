"""Register what a job may use beyond TorchTitan: our flavors and datasets, the user's extension."""

import importlib

from torchtitan.config import JobConfig

from .. import models
from ..data.text import datasets
from ..errors import ConfigError, in_one_line


def register_extensions(job_config: JobConfig) -> None:
    """Register this package's flavors and datasets, and import ``experimental.custom_import``.

    The imported module may register models, datasets, and converters.

    Raises:
        ConfigError: if the module cannot be imported.
    """
    models.register()
    datasets.register()
    name = job_config.experimental.custom_import
    if not name:
        return
    try:
        importlib.import_module(name)
    except Exception as error:  # the module may do anything
        raise ConfigError(
            "experimental.custom_import", name, f"cannot be imported: {in_one_line(error)}"
        ) from error
