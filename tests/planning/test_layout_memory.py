"""The memory of a plan's layouts, which is computed, against that of the dry run, which is
simulated."""

import dataclasses

import pytest
from torchtitan.models.llama3 import llama3_args
from torchtitan.models.qwen3 import qwen3_args

from jobs import ROOT
from torchtitan.experiments.tst import models
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.planning.dry_run import dry_run
from torchtitan.experiments.tst.planning.layout_memory import Batch, LayoutMemory
from torchtitan.experiments.tst.planning.layouts import KEYS
from torchtitan.experiments.tst.planning.model_shape import Layout, shape_of
from torchtitan.experiments.tst.planning.pipeline_stages import pipeline_ranks
from torchtitan.experiments.tst.planning.plan import default_ranks, parameters_of

models.register()
TOLERANCE = 0.1
ACCUMULATION = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A job of few layers: its model, layout and activation checkpointing."""

    model: str
    layout: Layout
    checkpointing: str = "none"
    chunks: int = 8
    sequences: int = 2
    length: int = 1024
    layers: int = 2

    @property
    def arguments(self):
        baseline = {"3B": "3B-20k-baseline", "10B-A1B": "10B-A1B-125k-baseline"}[self.model]
        mode, _, option = self.checkpointing.partition(" ")
        global_batch = self.sequences * ACCUMULATION * self.layout.data_parallel
        degrees = {key: getattr(self.layout, name) for name, key in KEYS.items()}
        return [
            f"--job.config_file={ROOT}/train_configs/paper/{baseline}.toml",
            f"--model.flavor={self.model}_short",
            f"--training.seq_len={self.length}",
            f"--training.local_batch_size={self.sequences}",
            f"--training.global_batch_size={global_batch}",
            f"--activation_checkpoint.mode={mode}",
            f"--activation_checkpoint.selective_ac_option={option or 2}",
            f"--lm_head.chunks={self.chunks}",
            *(f"--parallelism.{key}={degree}" for key, degree in degrees.items()),
        ]

    def __str__(self):
        sizes = {name: size for name, size in dataclasses.asdict(self.layout).items() if size > 1}
        layout = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return f"{self.model}: {layout}, {self.checkpointing}, {self.chunks} chunks"


QUICK = [
    Case("3B", Layout(shard=8), "none"),
    Case("3B", Layout(replicate=2, shard=4), "full"),
    Case("10B-A1B", Layout(shard=8), "selective"),
    Case("10B-A1B", Layout(shard=4, tensor=2), "selective op"),
]
SLOW = [
    Case("3B", Layout(shard=8), "none", chunks=1, sequences=8, layers=4),
    Case("3B", Layout(shard=64), "full", sequences=1, length=512, layers=4),
    Case("3B", Layout(shard=4, tensor=4), "none", chunks=1, sequences=4, layers=4),
    Case("3B", Layout(shard=4, context=2), "full", sequences=4, length=2048, layers=4),
    Case("3B", Layout(shard=4, context=2), "none", sequences=4, length=2048, layers=4),
    Case("3B", Layout(replicate=4), "none"),
    Case("3B", Layout(replicate=4), "full"),
    Case("3B", Layout(shard=4, pipeline=2), "full", chunks=1, sequences=8, layers=4),
    Case("3B", Layout(shard=2, pipeline=2, tensor=2), "none", chunks=1, sequences=4, layers=4),
    Case("10B-A1B", Layout(shard=8, expert=4), "none"),
    Case("10B-A1B", Layout(shard=8, expert=4), "full", sequences=4, length=2048),
    Case("10B-A1B", Layout(shard=4, tensor=2, expert=4), "full", sequences=4, length=2048),
    Case("10B-A1B", Layout(shard=4, tensor=2, expert=4, expert_tensor=2), "full"),
    Case("10B-A1B", Layout(shard=4, context=2, expert=8), "none", sequences=4, length=2048),
]


@pytest.fixture
def shapes(monkeypatch):
    """The paper's shapes with fewer layers."""

    def of_layers(model, layers):
        flavors = llama3_args if model in llama3_args else qwen3_args
        short = dataclasses.replace(flavors[model], n_layers=layers)
        monkeypatch.setitem(flavors, f"{model}_short", short)

    return of_layers


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def test_memory_is_that_of_a_simulated_step(shapes, case):
    """Balanced and at worst; optimizer states to the byte."""
    shapes(case.model, case.layers)
    config = SuperpositionConfigManager().parse_args(case.arguments)
    run = dry_run(config, case.layout.ranks)
    assert not run.untraced
    shape = shape_of(config)
    ranks = pipeline_ranks(config, case.layout.pipeline, shape.layers)
    memory = LayoutMemory(config, shape)
    batch = Batch(case.sequences, ACCUMULATION, case.length)
    for worst, simulated in ((False, run.memory), (True, run.worst_case)):
        for expected in simulated.values():  # of recovery, the only stage of a baseline
            planned = memory.of(case.layout, batch, ranks, worst)
            assert planned.peak == pytest.approx(expected.peak, rel=TOLERANCE)
            assert planned.optimizer == expected.optimizer
            assert planned.pipeline_rank == expected.pipeline_rank


@pytest.mark.parametrize("name", ["3B", "10B-A1B"])
def test_parameters_and_gradients_are_those_of_the_model(shapes, name):
    """At the fullest moment a rank has its shards, its gradients, and the gathered LM head."""
    shapes(name, 2)
    case = Case(name, Layout(shard=8), "none", chunks=1)
    config = SuperpositionConfigManager().parse_args(case.arguments)
    shape, (expected,) = shape_of(config), dry_run(config, 8).memory.values()
    ranks = pipeline_ranks(config, 1, shape.layers)
    batch = Batch(case.sequences, ACCUMULATION, case.length)
    planned = LayoutMemory(config, shape).of(case.layout, batch, ranks)
    assert planned.gradients == expected.gradients == 4 * parameters_of(config) // 8
    head = 2 * shape.dim * shape.vocabulary
    assert expected.parameters == planned.gradients + head
    assert planned.parameters == expected.parameters + 2 * shape.dim  # and the last norm's


@pytest.mark.slow
@pytest.mark.parametrize("name", ["270M-20k-baseline", "3B-20k-baseline", "10B-A1B-125k-baseline"])
def test_memory_of_the_papers_jobs(name):
    file = ROOT / "train_configs" / "paper" / f"{name}.toml"
    config = SuperpositionConfigManager().parse_args([f"--job.config_file={file}"])
    ranks, training = default_ranks(config), config.training
    (expected,) = dry_run(config, ranks).memory.values()
    shape = shape_of(config)
    accumulation = training.global_batch_size // (training.local_batch_size * ranks)
    planned = LayoutMemory(config, shape).of(
        Layout(shard=ranks),
        Batch(training.local_batch_size, accumulation, training.seq_len),
        pipeline_ranks(config, 1, shape.layers),
    )
    assert planned.peak == pytest.approx(expected.peak, rel=TOLERANCE)
