"""For TorchTitan's own trainer: importing this module registers our flavors and datasets.

``python -m torchtitan.train --experimental.custom_import torchtitan.experiments.tst.extension ...``
"""

from . import models
from .data.text import datasets

models.register()
datasets.register()
