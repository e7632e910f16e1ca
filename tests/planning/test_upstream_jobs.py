"""Jobs that TorchTitan trains are planned and tried, with superposition."""

import dataclasses
import math

import pytest
import torch.distributed as dist
from torchtitan.models.llama3 import llama3_args
from torchtitan.models.qwen3 import qwen3_args
from upstream_jobs import INTEGRATION, OFFLOAD, OTHERS, PUBLISHED, SCHEDULE

from torchtitan.experiments.tst.checks.job import check_config
from torchtitan.experiments.tst.config.layout import dp_degree
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.planning.dry_run import dry_run
from torchtitan.experiments.tst.planning.plan import default_ranks, make_plan

TST = ("--superposition.bag_size=4", "--superposition.step_ratio=0.3")
NOT_SIMULATED = {name: job for name, job in (INTEGRATION | OTHERS).items() if job.reason == OFFLOAD}
SIMULATED = {name: job for name, job in (INTEGRATION | OTHERS).items() if name not in NOT_SIMULATED}


@pytest.fixture
def load(tmp_path):
    """The config of a job of the tables, and its ranks."""
    path = tmp_path / "schedule.csv"
    steps = {False: [f"F{i}" for i in range(8)], True: [f"B{i}" for i in range(8)]}
    path.write_text(
        "\n".join(
            ",".join(f"{stage}{step}" for stage, back in order for step in steps[back])
            for order in (
                [(first, False), (first + 2, False), (first + 2, True), (first, True)]
                for first in (0, 1)
            )
        )
    )

    def load(job):
        args = [arg.replace(SCHEDULE, str(path)) for arg in job.args]
        return SuperpositionConfigManager().parse_args([*args, *TST]), job.ranks

    return load


def try_job(config, ranks, simulate):
    run, plan = dry_run(config, ranks, simulate), make_plan(config, ranks)
    assert math.prod(size for name, size in run.mesh.items() if name not in ("ep", "etp")) == ranks
    assert ranks % default_ranks(config) == 0
    assert plan.data_parallel_ranks == dp_degree(config, ranks)
    assert plan.sequences == (
        plan.data_parallel_ranks * config.training.local_batch_size * run.accumulation
    )
    assert not dist.is_initialized()
    return run


@pytest.mark.parametrize("name", [*INTEGRATION, *PUBLISHED])
def test_checks(load, name):
    check_config(*load((INTEGRATION | PUBLISHED)[name]))


@pytest.mark.parametrize("name", NOT_SIMULATED)
def test_a_job_whose_memory_is_not_estimated(load, name):
    run = try_job(*load(NOT_SIMULATED[name]), simulate=True)
    assert not run.memory and NOT_SIMULATED[name].reason in run.untraced


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMULATED)
def test_a_job_whose_memory_is_estimated(load, name):
    check_memory(*load(SIMULATED[name]), SIMULATED[name].reason)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config(load, name, monkeypatch):
    """Its layers beyond the first 8 are alike, and take minutes."""
    config, ranks = load(PUBLISHED[name])
    flavors = {"llama3": llama3_args, "qwen3": qwen3_args}[config.model.name]
    args = flavors[config.model.flavor]
    short = dataclasses.replace(args, n_layers=min(args.n_layers, 8))
    monkeypatch.setitem(flavors, config.model.flavor, short)
    check_memory(config, ranks, PUBLISHED[name].reason)


def check_memory(config, ranks, reason):
    run = try_job(config, ranks, simulate=True)
    if reason:
        assert not run.memory and reason in run.untraced
        return
    assert not run.untraced and tuple(run.memory) == build_schedule(config).until(
        config.training.steps
    )
    assert run.left_out == (("model.converters",) if config.model.converters else ())
    assert all(0 < memory.rest < memory.peak for memory in run.memory.values())
    assert run.worst_case.keys() == (run.memory.keys() if "ep" in run.mesh else set())
    assert all(memory.peak > run.memory[stage].peak for stage, memory in run.worst_case.items())


def small(*args):
    return SuperpositionConfigManager().parse_args(
        [
            *("--model.flavor=demo", "--training.seq_len=64", "--training.dataset=c4_test"),
            *("--superposition.bag_size=4", "--superposition.step_ratio=0.3", *args),
        ]
    )


@pytest.mark.parametrize("attention", ["flex", "varlen"])
def test_masked_attention_takes_the_memory_of_sdpa(attention):
    """On CPU it is simulated with the whole mask written out."""
    run = dry_run(small(f"--model.flavor=demo_{attention}"), 4)
    plain = dry_run(small(), 4)
    assert len(run.memory) == 2
    for stage, memory in run.memory.items():
        assert memory.peak == pytest.approx(plain.memory[stage].peak, rel=0.1)


@pytest.mark.parametrize("name", ["quantize.linear.float8", "quantize.linear.mx"])
def test_converters_are_left_out_and_named(name):
    run = dry_run(small(f"--model.converters={name}"), 4)
    assert len(run.memory) == 2 and run.left_out == ("model.converters",)


def test_a_job_leaves_nothing_to_the_next():
    """Context parallelism changes how torch dispatches attention, and meshes are cached."""
    tensor = "--parallelism.tensor_parallel_degree=2"
    alone = dry_run(small(tensor), 4)
    dry_run(small("--parallelism.context_parallel_degree=2"), 4)
    hybrid = ["--parallelism.data_parallel_replicate_degree=2", tensor]
    assert dry_run(small(*hybrid), 8).memory
    assert dry_run(small(tensor), 4) == alone


def test_tensor_parallelism_takes_less_memory():
    """Shapes are inferred with tensors of the whole size, which are not on the GPU."""
    whole = dry_run(small("--training.local_batch_size=1"), 2).memory
    parts = dry_run(
        small("--training.local_batch_size=2", "--parallelism.tensor_parallel_degree=2"), 2
    ).memory
    assert all(memory.peak < 1.3 * whole[stage].peak for stage, memory in parts.items())
