"""What TorchTitan itself publishes is checked, planned and tried, with superposition added."""

import pytest
from upstream_jobs import CONFIGS, INTEGRATION_TESTS

from torchtitan.experiments.tst.core import Phase
from torchtitan.experiments.tst.job_checks import check_config
from torchtitan.experiments.tst.job_config import SuperpositionConfigManager
from torchtitan.experiments.tst.planning.dry_run import dry_run
from torchtitan.experiments.tst.planning.plan import default_ranks, make_plan

JOBS = CONFIGS | INTEGRATION_TESTS
QUICK = ("looped PP", "validation, TP, CP, PP", "qwen3 MoE, FSDP, TP, EP", "offload")


def load(name):
    return SuperpositionConfigManager().parse_args(
        [*JOBS[name].args, "--superposition.bag_size=4", "--superposition.step_ratio=0.3"]
    )


@pytest.mark.parametrize("name", JOBS)
def test_checks(name):
    config = load(name)
    check_config(config, JOBS[name].ranks)
    assert JOBS[name].ranks % default_ranks(config) == 0


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in JOBS]
)
def test_plan_and_dry_run(name):
    """An estimate, or a line that says why there is none."""
    config, ranks = load(name), JOBS[name].ranks
    plan = make_plan(config, ranks)
    assert plan.phases[0].steps == round(0.3 * config.training.steps)
    run = dry_run(config, ranks)
    assert run.accumulation == plan.accumulation
    assert run.untraced.startswith("memory is not estimated ") or set(run.memory) == set(Phase)
    stood_in = config.model.converters or config.model.flavor.endswith(("flex_attn", "varlen_attn"))
    assert bool(run.stand_ins) == bool(stood_in)


def small(*args):
    return SuperpositionConfigManager().parse_args(
        [
            *("--model.flavor=demo", "--training.seq_len=64", "--training.dataset=c4_test"),
            *("--superposition.bag_size=4", "--superposition.step_ratio=0.3", *args),
        ]
    )


@pytest.mark.parametrize("attention", ["flex", "varlen"])
def test_masked_attention_takes_the_memory_of_sdpa(attention):
    """On CPU it is played with the whole mask written out."""
    run = dry_run(small(f"--model.flavor=demo_{attention}"), 4)
    plain = dry_run(small(), 4)
    assert run.memory == plain.memory
    assert (run.stand_ins, plain.stand_ins) == (f"{attention} attention as SDPA", "")


@pytest.mark.parametrize("name", ["quantize.linear.float8", "quantize.linear.mx"])
def test_converters_are_left_out_and_named(name):
    run = dry_run(small(f"--model.converters={name}"), 4)
    assert len(run.memory) == 2 and run.stand_ins == f"without {name}"


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
    assert all(parts[phase].peak < 1.3 * whole[phase].peak for phase in Phase)
