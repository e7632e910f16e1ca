"""Train on made-up batches that are the same however many ranks share them.

Run under torchrun by test_distributed.py with the arguments of a job.
"""

import torch

from torchtitan.experiments.tst.device import enable_cpu_if_alone

enable_cpu_if_alone()

import torchtitan.train as upstream  # noqa: E402

from torchtitan.experiments.tst import models  # noqa: E402, F401
from torchtitan.experiments.tst.core import IGNORE_INDEX  # noqa: E402
from torchtitan.experiments.tst.data import datasets  # noqa: E402, F401
from torchtitan.experiments.tst.job_config import SuperpositionConfigManager  # noqa: E402
from torchtitan.experiments.tst.trainer import SuperpositionTrainer  # noqa: E402


class SyntheticTrainer(SuperpositionTrainer):
    """Each step's global batch depends on the step alone; a rank takes its rows of it."""

    def batch_generator(self, data_iterable):
        ranks, rank = 1, 0
        if self.parallel_dims.dp_enabled:
            mesh = self.parallel_dims.get_mesh("batch")
            ranks, rank = mesh.size(), mesh.get_local_rank()
        while True:
            shape = self.batch_shape(self.step)
            inputs, labels = self.global_batch(
                ranks * self.gradient_accumulation_steps * shape.sequences, shape.data_tokens
            )
            parts = zip(
                inputs.split(shape.sequences)[rank::ranks],
                labels.split(shape.sequences)[rank::ranks],
                strict=True,
            )
            for part_inputs, part_labels in parts:
                self.metrics_processor.data_loading_times.append(0.0)
                yield {"input": part_inputs.clone()}, part_labels.clone()

    def global_batch(self, sequences: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.step)
        stream = torch.randint(1000, (sequences, length + 1), generator=generator)
        labels = stream[:, 1:].clone()
        # many ignored labels in the first rows, none in the last
        share = torch.linspace(0.8, 0.0, sequences)[:, None]
        labels[torch.rand(labels.shape, generator=generator) < share] = IGNORE_INDEX
        return stream[:, :-1], labels


if __name__ == "__main__":
    upstream.ConfigManager = SuperpositionConfigManager
    upstream.main(SyntheticTrainer)
