"""What upstream's own trainer is given through ``experimental.custom_import``: the datasets and
the flavors of the test jobs, nothing else of ours."""

import torchtitan.experiments.tst.data.datasets
import torchtitan.experiments.tst.models  # noqa: F401
