"""Layouts of a job: which there are, which fit, and the one to take."""

import math

import pytest
from torchtitan.distributed import ParallelDims

from jobs import ROOT
from torchtitan.experiments.tst.checks.job import check_config
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.planning.layout_traffic import Group, Traffic
from torchtitan.experiments.tst.planning.layouts import KEYS, Machine, degrees_of, layouts_of
from torchtitan.experiments.tst.planning.layouts_table import name_of, table
from torchtitan.experiments.tst.planning.model_shape import Layout, shape_of
from torchtitan.experiments.tst.planning.plan import GPUS, Gpu

MOE = "paper/10B-A1B-50k-tst"
DENSE = "paper/3B-20k-tst"


def load(path, *args):
    file = ROOT / "train_configs" / f"{path}.toml"
    return SuperpositionConfigManager().parse_args([f"--job.config_file={file}", *args])


def machine(ranks, gpu="B200", node=8):
    return Machine(GPUS[gpu], ranks, node, 0.4)


@pytest.fixture(scope="module")
def moe():
    return layouts_of(load(MOE), machine(64))


@pytest.fixture(scope="module")
def dense():
    return layouts_of(load(DENSE), machine(32))


def test_degrees_are_all_factorizations():
    """Of 8 ranks: 3 factors of 2 over 5 degrees; experts over shards x context x tensor."""
    dense = list(degrees_of(8, shape_of(load(DENSE))))
    assert len(dense) == len(set(dense)) == math.comb(3 + 4, 4)
    assert all(layout.ranks == 8 for layout in dense)
    moe = list(degrees_of(8, shape_of(load(MOE))))
    assert len(moe) == len(set(moe)) and set(dense) < set(moe)
    for layout in moe:
        shards = layout.shard * layout.context * layout.tensor
        assert shards % (layout.expert * layout.expert_tensor) == 0
        assert layout.expert_tensor in (1, layout.tensor) and 128 % layout.expert == 0


@pytest.mark.parametrize("path", [MOE, DENSE])
def test_every_layout_is_one_that_torchtitan_takes(path, moe, dense):
    length = load(path).training.seq_len
    for candidate in (moe if path == MOE else dense).fitting:
        layout = candidate.layout
        dims = ParallelDims(
            dp_replicate=layout.replicate,
            dp_shard=layout.shard,
            cp=layout.context,
            tp=layout.tensor,
            pp=layout.pipeline,
            ep=layout.expert,
            etp=layout.expert_tensor,
            world_size=layout.ranks,
        )
        assert length % dims.seq_len_divisor == 0
        assert 16 % layout.tensor == 0 and 4 % layout.tensor == 0  # heads, key-value heads


def test_a_choice_passes_the_checks_of_a_job(moe, dense):
    for path, layouts in ((MOE, moe), (DENSE, dense)):
        for candidate in layouts.fitting[:5]:
            degrees = [
                f"--parallelism.{key}={getattr(candidate.layout, name)}"
                for name, key in KEYS.items()
            ]
            batch = [
                f"--training.local_batch_size={candidate.batch.local}",
                f"--training.global_batch_size={layouts.sequences}",
            ]
            check_config(load(path, *degrees, *batch), candidate.layout.ranks)


def test_the_sequences_of_a_step_stay(moe):
    for candidate in moe.fitting:
        batch = candidate.batch
        assert batch.local * batch.accumulation * candidate.layout.data_parallel == 2048
        assert batch.local <= 8


def test_models_have_the_layouts_that_upstream_has_for_them(moe, dense):
    assert all(candidate.layout.pipeline == 1 for candidate in moe.fitting)  # no pipeline
    assert moe.refused["parallelism.pipeline_parallel_degree"] > 0
    assert all(candidate.layout.expert == 1 for candidate in dense.fitting)
    # its LM head is in chunks, which a pipeline cannot have
    assert all(candidate.layout.pipeline == 1 for candidate in dense.fitting)
    whole = layouts_of(load(DENSE, "--lm_head.chunks=1"), machine(16))
    assert any(candidate.layout.pipeline > 1 for candidate in whole.fitting)


def test_experts_that_no_ranks_share_have_no_worst_case(moe):
    for candidate in moe.fitting:
        if candidate.layout.expert == 1:
            assert candidate.worst == candidate.memory
        else:
            assert candidate.worst.peak > candidate.memory.peak


def test_the_fastest_comes_first_and_one_whose_worst_case_fits(moe):
    assert moe.choice is moe.fitting[0]
    limit = machine(64).usable
    fit = [candidate for candidate in moe.fitting if candidate.worst.peak <= limit]
    assert moe.fitting[: len(fit)] == fit
    times = [float(f"{candidate.step:.2g}") for candidate in fit]
    assert times == sorted(times)


def test_what_does_not_fit_is_counted_and_the_nearest_named():
    small = Machine(Gpu("A100", 312e12, 24e9), 8, 8, 0.4)
    layouts = layouts_of(load(MOE), small)
    assert layouts.too_large > 0 and layouts.nearest.memory.peak > small.usable
    assert all(candidate.memory.peak <= small.usable for candidate in layouts.fitting)
    text = "\n".join(table(load(MOE), layouts, small, 3))
    assert f"{layouts.too_large} too large, the nearest {name_of(layouts.nearest.layout)}" in (text)
    nothing = Machine(Gpu("A100", 312e12, 1e9), 8, 8, 0.4)
    none = layouts_of(load(MOE), nothing)
    assert none.choice is None and "Take" not in "\n".join(table(load(MOE), none, nothing, 3))


def test_a_micro_batch_is_lowered_to_fit_and_said_to_be():
    """8 sequences of 4,096 do not fit 48 GB with FSDP over 16; fewer do."""
    small = Machine(Gpu("A100", 312e12, 48e9), 16, 8, 0.4)
    layouts = layouts_of(load(MOE), small)
    (fsdp,) = (c for c in layouts.fitting if c.layout == Layout(shard=16))
    assert fsdp.batch.local < 8 and fsdp.batch.local * fsdp.batch.accumulation == 128
    lines = table(load(MOE), layouts, small, len(layouts.fitting))
    (row,) = (line for line in lines if line.startswith("  dp_shard 16  "))
    assert f"{fsdp.batch.local}* x {fsdp.batch.accumulation}" in row
    assert "  * training.local_batch_size lowered from 8" in lines


def test_1024_ranks_take_smaller_micro_batches():
    layouts = layouts_of(load(MOE), machine(1024))
    assert layouts.sequences == 2048
    assert all(one.layout.ranks == 1024 for one in layouts.fitting)
    (fsdp,) = (one for one in layouts.fitting if one.layout == Layout(shard=1024))
    assert (fsdp.batch.local, fsdp.batch.accumulation) == (2, 1)
    # 128 experts over 1,024 ranks: a rank keeps one of each layer, seven of eight have none
    part = shape_of(load(MOE)).part("experts", fsdp.layout)
    assert part.sharded == 3 * 1024 * 1024
    assert part.gathered == 8 * 128 * 3 * 1024 * 1024


def test_without_a_global_batch_the_jobs_own_stays():
    job = load("debug/llama3", "--parallelism.data_parallel_shard_degree=-1")
    layouts = layouts_of(job, machine(4))
    assert layouts.sequences == 4 * 4
    for candidate in layouts.fitting:
        assert candidate.layout.data_parallel * candidate.batch.local <= 16


def test_other_architectures_are_refused():
    with pytest.raises(ConfigError, match=r"model.name = 'deepseek_v3': must be llama3 or qwen3: "):
        job = load("debug/llama3", "--model.name=deepseek_v3", "--model.flavor=debugmodel")
        layouts_of(job, machine(4))


@pytest.mark.parametrize(
    ("group", "local", "across"),
    [
        (Group(8, 1, 8), 7, 0),  # a node
        (Group(64, 1, 8), 63 * 7 / 8, 63 / 8),  # of the ring's links, one in eight crosses
        (Group(8, 8, 8), 0, 7),  # a rank of each node
        (Group(16, 2, 8), 15 * 3 / 4, 15 / 4),
        (Group(1, 1, 8), 0, 0),
    ],
)
def test_what_of_a_ring_crosses_nodes(group, local, across):
    assert group.ring(1) == Traffic(local, across)


def test_an_all_to_all_goes_to_every_rank():
    assert Group(16, 1, 8).all_to_all(16) == Traffic(7, 8)
    assert Group(16, 4, 8).all_to_all(16) == Traffic(1, 14)


def test_a_replicas_reduction_crosses_what_its_shards_do_not(moe):
    by_layout = {candidate.layout: candidate.traffic for candidate in moe.fitting}
    hybrid = by_layout[Layout(replicate=8, shard=8)]
    assert hybrid["FSDP"].across == 0 and hybrid["DDP"].local == 0
    assert by_layout[Layout(shard=64)]["FSDP"].across > 0
