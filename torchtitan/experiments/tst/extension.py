"""Register our flavors and datasets in TorchTitan's own trainer, when this module is imported.

``python -m torchtitan.train --experimental.custom_import torchtitan.experiments.tst.extension ...``
"""

from . import models
from .data.text import datasets

models.register()
datasets.register()
