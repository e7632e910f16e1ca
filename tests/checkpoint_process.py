"""The trainer on CPU with checkpoint.async_mode = "async_with_pinned_mem", without pinned memory.

So DCP saves in a process of its own, as on a GPU.
"""

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torchtitan.components import checkpoint

from torchtitan.experiments.tst import train
from torchtitan.experiments.tst.checks import job


class Stager(DefaultStager):
    def __init__(self, options):
        super().__init__(StagingOptions(False, True, True, False))


if __name__ == "__main__":
    job.check_machine = lambda config: None  # which asks for a GPU
    checkpoint.DefaultStager = Stager
    train.main()
