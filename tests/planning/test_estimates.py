"""Jobs for many GPUs, built and simulated without them."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from jobs import ROOT
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.planning.dry_run import dry_run
from torchtitan.experiments.tst.planning.plan import GPUS, default_ranks, parameters_of

PAPER = ROOT / "train_configs" / "paper"
CONFIGS = sorted((ROOT / "train_configs").rglob("*.toml"))


def load(path, *args):
    return SuperpositionConfigManager().parse_args([f"--job.config_file={path}", *args])


@pytest.fixture(scope="module")
def build():
    """The model of a job, built once for all jobs that differ in superposition and data only."""
    builds = {}

    def build_once(config, ranks):
        training = dataclasses.replace(config.training, dataset="", dataset_path="", steps=1)
        model = (config.model, config.parallelism, config.activation_checkpoint, config.compile)
        job = str((*model, training, ranks))
        if job not in builds:
            builds[job] = dry_run(config, ranks, simulate=False)
        return builds[job]

    return build_once


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_is_built_for_its_ranks(path, build):
    config = load(path)
    ranks = default_ranks(config)
    run = build(config, ranks)
    assert run.mesh == ({"dp_shard": ranks} if ranks > 1 else {})
    training = config.training
    assert run.accumulation == training.global_batch_size // (
        training.local_batch_size * ranks
    ) or (training.global_batch_size == -1 and run.accumulation == 1)
    assert not dist.is_initialized() and torch.nn.init.trunc_normal_.__module__ == "torch.nn.init"


def test_its_data_need_not_be_here():
    data = ["--training.dataset=jsonl", "--training.dataset_path=/none/*.jsonl"]
    assert dry_run(load(PAPER.parent / "debug/llama3.toml", *data), 8, simulate=False).mesh


FEW_TOKENS = ["--training.local_batch_size=1", "--validation.local_batch_size=1"]


@pytest.mark.parametrize(
    ("path", "ranks", "args"),
    [
        ("debug/llama3", 8, FEW_TOKENS),
        pytest.param("paper/270M-20k-tst", None, [], marks=pytest.mark.slow),
        pytest.param("paper/10B-A1B-50k-tst", None, [], marks=pytest.mark.slow),
    ],
)
def test_memory_of_parameters_gradients_and_optimizer(path, ranks, args):
    config = load(ROOT / "train_configs" / f"{path}.toml", *args)
    ranks = ranks or default_ranks(config)
    *_, memory = dry_run(config, ranks).memory.values()  # of recovery
    # Adam in float32, over the ranks; padded shards aside
    of_a_rank = parameters_of(config) / ranks
    assert memory.optimizer == pytest.approx(8 * of_a_rank, rel=0.01)
    assert memory.parameters >= 4 * of_a_rank and memory.gradients >= 4 * of_a_rank * 0.9
    assert memory.peak == memory.parameters + memory.gradients + memory.optimizer + memory.rest


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(PAPER.rglob("*.toml")), ids=lambda path: path.stem)
def test_memory_of_every_paper_config(path):
    config = load(path)
    run = dry_run(config, default_ranks(config))
    assert tuple(run.memory) == build_schedule(config).until(config.training.steps)
    assert all(20e9 < memory.peak < 0.9 * GPUS["B200"].memory for memory in run.memory.values())


DEMO = ROOT / "train_configs" / "demo" / "tst.toml"
MOE = ROOT / "train_configs" / "debug" / "qwen3_moe.toml"


@pytest.mark.parametrize(
    ("path", "ranks", "args", "mesh"),
    [
        (DEMO, 1, [], {}),
        (DEMO, 2, ["--parallelism.tensor_parallel_degree=2"], {"tp": 2}),
        (
            DEMO,
            8,
            [
                "--parallelism.data_parallel_replicate_degree=2",
                "--parallelism.data_parallel_shard_degree=2",
                "--parallelism.tensor_parallel_degree=2",
                "--training.local_batch_size=16",
            ],
            {"dp_replicate": 2, "dp_shard": 2, "tp": 2},
        ),
        (MOE, 16, [], {"dp_shard": 16}),
        *(
            (
                DEMO,
                4,
                ["--training.local_batch_size=16", f"--superposition.{value}"],
                {"dp_shard": 4},
            )
            for value in ("loss=bce", "scale=batch", "mode=output", "reinit_at_recovery=output")
        ),
    ],
)
def test_layouts_and_variants_are_simulated(path, ranks, args, mesh):
    if ranks > 1 and not any("shard_degree" in arg for arg in args):
        args = [*args, "--parallelism.data_parallel_shard_degree=-1"]
    run = dry_run(load(path, *args), ranks)
    assert run.mesh == mesh
    assert len(run.memory) == 2 and all(memory.peak > 0 for memory in run.memory.values())


def test_chunks_of_the_lm_head_take_less_memory_in_both_phases():
    whole, chunked = (
        dry_run(load(DEMO, f"--lm_head.chunks={chunks}"), 2).memory for chunks in (1, 8)
    )
    logits = 4 * 32 * 64 * 1024  # of a micro-batch, float32, in bytes
    assert len(whole) == len(chunked) == 2
    for stage, memory in chunked.items():
        assert memory.peak < whole[stage].peak - logits / 2


def test_more_sequences_take_more_memory_and_more_ranks_less_state():
    (_, small), (_, large), (_, sharded) = (
        dry_run(load(DEMO, f"--training.local_batch_size={batch}"), ranks).memory.values()
        for batch, ranks in ((8, 1), (32, 1), (8, 8))
    )
    assert large.rest > 3 * small.rest
    assert sharded.optimizer == pytest.approx(small.optimizer / 8, rel=0.05)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--training.enable_cpu_offload"], "enable_cpu_offload"),
        (["--activation_checkpoint.mode=memory_budget", "--compile.enable"], "memory_budget"),
    ],
)
def test_what_cannot_be_simulated_says_so(args, reason):
    run = dry_run(load(MOE, *args, "--superposition.bag_size=1"), 4)
    assert not run.memory and reason in run.untraced


def test_what_does_not_fit_together_is_an_error():
    with pytest.raises(ConfigError, match=r"data_parallel_shard_degree = 8.*there are 12"):
        dry_run(load(PAPER / "270M-20k-tst.toml"), 12)
    with pytest.raises(ConfigError, match="global_batch_size = 1024: must be a multiple of 1536"):
        args = ["--parallelism.data_parallel_shard_degree=96"]
        dry_run(load(PAPER / "270M-20k-tst.toml", *args), 96)
