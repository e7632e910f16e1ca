"""What the ranks of a job tell each other in a step, beside what TorchTitan's own trainer does."""

import json

import pytest
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torchtitan.train import Trainer

from jobs import ON
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.testing import ranks
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

RANKS = 2


def count(file, kind, args):
    """Collectives of each step, by name, with CommDebugMode."""
    counts = []

    class Counting(kind):
        def train_step(self, data_iterator):
            with CommDebugMode() as mode:
                super().train_step(data_iterator)
            counts.append({str(op): number for op, number in mode.get_comm_counts().items()})

    trainer = Counting(SuperpositionConfigManager().parse_args(args))
    trainer.train()
    trainer.close()
    if dist.get_rank() == 0:
        file.write_text(json.dumps(counts))
    dist.destroy_process_group()


@pytest.fixture
def collectives(base_args, tmp_path):
    def run(kind, *args):
        folder = tmp_path / kind.__name__
        job = [*base_args, f"--job.dump_folder={folder}", "--metrics.log_freq=1000", *args]
        file = folder / "counts.json"
        if log := ranks.run_ranks(count, RANKS, folder, file, kind, job):
            pytest.fail(log)
        return json.loads(file.read_text())

    return run


def test_a_step_has_one_small_reduction_more_than_torchtitans(collectives):
    """For what is not finite and requests to stop; in superposition one more, of the targets."""
    of_upstream = collectives(Trainer)[1]
    ours = collectives(SuperpositionTrainer, *ON)
    reductions = [op for op in ours[1] if "reduce" in op and "scatter" not in op]
    for step, more in ((1, 2), (4, 1)):  # the second of superposition, of recovery
        assert sum(ours[step].values()) == sum(of_upstream.values()) + more
        extra = {op: n - of_upstream.get(op, 0) for op, n in ours[step].items()}
        assert sum(extra[op] for op in reductions) == more


def test_the_auxiliary_loss_has_one_small_reduction_more(collectives):
    """Counting the experts' tokens has none, where no metrics are logged."""
    job = ("--model.name=qwen3", "--model.flavor=debugmodel_moe_tiny", *ON)
    counted = {
        method: collectives(SuperpositionTrainer, *job, f"--load_balance.method={method}")
        for method in ("none", "auxiliary_loss")
    }
    of_upstream = collectives(Trainer, *(arg for arg in job if arg not in ON))[1]
    for step, more in ((1, 2), (4, 1)):
        none, auxiliary = (sum(steps[step].values()) for steps in counted.values())
        assert none == sum(of_upstream.values()) + more
        assert auxiliary == none + 1
