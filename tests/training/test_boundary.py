"""What the first step of a stage or of recovery needs: code for its shape, time to compile it."""

import pytest
import torch
from torch._dynamo.backends.registry import register_backend
from torchtitan.distributed import utils as dist_utils

from jobs import BOUNDARY, ON, losses, superposition
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

COMPILED = []  # for each compilation, whether it is for any shape


@register_backend
def recording(graph, inputs):
    """Of torch.compile: runs the graph as it is."""
    COMPILED.append(any(isinstance(value, torch.SymInt) for value in inputs))
    return graph.forward


@pytest.mark.parametrize("stages", [ON, superposition("8,4,2", 3)], ids=["one stage", "stages"])
@pytest.mark.parametrize("scale", ["batch", "sequence"])
def test_each_stage_is_compiled_for_its_own_shape(finished, train, scale, stages):
    """Not for any shape, which torch.compile turns to when it sees a second one."""
    compiling = set()

    class Trainer(SuperpositionTrainer):
        def train_step(self, data_iterator):
            before = len(COMPILED)
            super().train_step(data_iterator)
            if len(COMPILED) > before:
                compiling.add(self.step)

    torch.compiler.reset()
    args = (*stages, f"--superposition.scale={scale}", "--optimizer.lr=1e-4")
    plain = finished(*args)
    COMPILED.clear()
    compiled = train(
        *args, "--compile.enable", "--compile.backend=recording", trainer_class=Trainer
    )
    changes = [1, 4] if stages is ON else [1, 2, 3, 4]
    assert compiling == set(changes)
    assert not any(COMPILED)
    assert losses(compiled) == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("chunks", [1, 3], ids=["whole", "uneven chunks"])
def test_any_number_of_bag_sizes_is_compiled(train, chunks):
    """Though torch.compile gives up a function that it has compiled eight times."""
    sizes = range(11, 1, -1)
    compiled = {}

    class Trainer(SuperpositionTrainer):
        def train_step(self, data_iterator):
            before = len(COMPILED)
            super().train_step(data_iterator)
            compiled[self.step] = COMPILED[before:]

    torch.compiler.reset()
    COMPILED.clear()
    stages = superposition(",".join(map(str, sizes)), len(sizes))
    train(
        *(*stages, "--training.steps=12", "--training.seq_len=16"),
        *("--compile.enable", "--compile.backend=recording", f"--lm_head.chunks={chunks}"),
        trainer_class=Trainer,
    )
    of_stages = [compiled[step] for step in range(1, len(sizes) + 1)]
    assert all(of_stages) and not any(map(any, of_stages))


def test_recovery_may_compile_as_long_as_the_first_step(train, monkeypatch):
    timeouts = []

    def set_pg_timeouts(timeout, parallel_dims):
        timeouts.append((kept["trainer"].step, timeout.total_seconds()))

    class Trainer(SuperpositionTrainer):
        def train_step(self, data_iterator):
            kept["trainer"] = self
            super().train_step(data_iterator)
            timeouts.append("step")

    kept = {}
    monkeypatch.setattr(dist_utils, "set_pg_timeouts", set_pg_timeouts)
    comm = ("--comm.init_timeout_seconds=300", "--comm.train_timeout_seconds=20")
    train(*ON, *comm, trainer_class=Trainer)
    first, boundary = BOUNDARY + 1, ["step"] * (BOUNDARY - 1)
    in_recovery = [(first, 300), (first, 20), "step", "step", "step"]
    assert timeouts == ["step", (1, 20), *boundary, *in_recovery]
