"""Memory under each parallelism, against counts by hand."""

import dataclasses

import pytest
import torch
import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.models.moe import moe
from torchtitan.models.qwen3 import qwen3_args

from jobs import ROOT
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.planning import trials
from torchtitan.experiments.tst.planning.dry_run import DryRun, Memory, dry_run, simulate_rank
from torchtitan.experiments.tst.planning.plan import GPUS
from torchtitan.experiments.tst.upstream.fake_parallel import Routing

DENSE, MOE = "demo/tst", "debug/qwen3_moe"
DEGREES = {
    "pp": "pipeline_parallel_degree",
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
}


def load(path, *args, **degrees):
    layout = [f"--parallelism.{DEGREES[name]}={size}" for name, size in degrees.items()]
    return SuperpositionConfigManager().parse_args(
        [
            f"--job.config_file={ROOT / 'train_configs' / path}.toml",
            *(
                "--validation.no-enable",
                "--training.global_batch_size=-1",
                "--superposition.bag_size=1",
            ),
            *(*layout, *args),
        ]
    )


def recovery(run: DryRun) -> Memory:
    assert not run.untraced, run.untraced
    (memory,) = run.memory.values()
    return memory


def shapes_of(config):
    spec = train_spec_module.get_train_spec(config.model.name)
    with torch.device("meta"):
        return dict(spec.model_cls(spec.model_args[config.model.flavor]).named_parameters())


def states_by_hand(config, names=("",), fsdp=1, tp=1):
    """Bytes of Adam's states of a rank: two moments in float32, and a step, of each parameter.

    Of those whose names begin with one of ``names``.

    Experts are divided among all ranks of FSDP and tensor parallelism, whatever the degree of
    expert parallelism; norms and routers are not divided by tensor parallelism.
    """
    size = 0
    for name, parameter in shapes_of(config).items():
        if name.startswith(names):
            whole = "norm" in name or "router" in name
            size += 8 * parameter.numel() // (fsdp if whole else fsdp * tp) + 4
    return size


@pytest.mark.parametrize(
    ("path", "degrees", "ranks", "divided"),
    [
        (MOE, {}, 1, {}),
        (MOE, {"shard": 4}, 4, {"fsdp": 4}),
        (MOE, {"shard": 4, "ep": 2}, 4, {"fsdp": 4}),
        (MOE, {"shard": 4, "ep": 4}, 4, {"fsdp": 4}),
        (MOE, {"shard": 2, "tp": 2, "ep": 2}, 4, {"fsdp": 2, "tp": 2}),
        pytest.param(
            MOE, {"shard": 2, "tp": 2, "ep": 4}, 4, {"fsdp": 2, "tp": 2}, marks=pytest.mark.slow
        ),
        (MOE, {"shard": 2, "tp": 2, "ep": 2, "etp": 2}, 4, {"fsdp": 2, "tp": 2}),
        pytest.param(MOE, {"shard": 2, "cp": 2, "ep": 2}, 4, {"fsdp": 4}, marks=pytest.mark.slow),
        pytest.param(
            MOE, {"replicate": 2, "shard": 2, "ep": 2}, 4, {"fsdp": 2}, marks=pytest.mark.slow
        ),
        (DENSE, {"replicate": 4, "shard": 1}, 4, {}),
        (DENSE, {"shard": 2, "cp": 2}, 4, {"fsdp": 4}),
        (DENSE, {"shard": 1, "cp": 4}, 4, {"fsdp": 4}),
        (DENSE, {"shard": 2, "tp": 2, "cp": 2}, 8, {"fsdp": 4, "tp": 2}),
    ],
)
def test_states_of_the_optimizer(path, degrees, ranks, divided):
    config = load(path, **degrees)
    run = dry_run(config, ranks)
    assert recovery(run).optimizer == states_by_hand(config, **divided)
    assert bool(run.worst_case) == ("ep" in degrees)


FIRST, LAST = ("tok_embeddings", "layers.0"), ("layers.1", "norm", "output")


@pytest.mark.parametrize(
    ("degrees", "ranks", "divided"),
    [
        ({"pp": 2, "shard": 1}, 2, {}),
        ({"pp": 2, "shard": 2}, 4, {"fsdp": 2}),
        pytest.param(
            {"pp": 2, "shard": 2, "tp": 2}, 8, {"fsdp": 2, "tp": 2}, marks=pytest.mark.slow
        ),
        ({"pp": 2, "shard": 1, "cp": 2}, 4, {"fsdp": 2}),
    ],
)
def test_each_rank_of_a_pipeline_has_its_layers(degrees, ranks, divided):
    config = load(DENSE, "--training.local_batch_size=4", **degrees)
    memory = {}
    for rank, names in ((0, FIRST), (1, LAST)):
        memory[rank] = recovery(simulate_rank(config, ranks, rank))
        assert memory[rank].optimizer == states_by_hand(config, names, **divided)
        assert memory[rank].pipeline_rank == rank
    assert recovery(dry_run(config, ranks)) == max(memory.values(), key=lambda of: of.peak)


@pytest.mark.parametrize(
    ("schedule", "rank"),
    [
        ("1F1B", 0),
        ("1F1B", 1),
        ("GPipe", 1),
        pytest.param("Interleaved1F1B", 1, marks=pytest.mark.slow),
        pytest.param("ZBVZeroBubble", 0, marks=pytest.mark.slow),
    ],
)
def test_few_micro_batches_stand_for_all(schedule, rank):
    """Except where a schedule divides backward: there all are simulated in any case."""
    args = [f"--parallelism.pipeline_parallel_schedule={schedule}"]
    args += ["--training.local_batch_size=8", "--activation_checkpoint.mode=none"]
    config = load(DENSE, *args, pp=2, shard=2)
    few, many = (
        recovery(simulate_rank(config, 4, rank, repeats=repeats)) for repeats in (True, False)
    )
    assert few.peak == pytest.approx(many.peak, rel=1e-4)
    assert few.gradients == many.gradients


def test_gpipe_holds_all_micro_batches_and_1f1b_as_many_as_there_are_ranks():
    def peak(schedule, micro_batches):
        args = [f"--parallelism.pipeline_parallel_schedule={schedule}"]
        args += [f"--training.local_batch_size={micro_batches}"]
        return recovery(simulate_rank(load(DENSE, *args, pp=2, shard=1), 2, 0)).peak

    # input of a micro-batch of 64 latents in int64, and gradient of its output, 64 in float32;
    # torch from 2.15 allocates the gradient only for backward
    buffers = 64 * (8 + 8) + (64 * 64 * 4 if torch.__version__ < "2.15" else 0)
    assert peak("1F1B", 8) - peak("1F1B", 4) == pytest.approx(4 * buffers, rel=0.05)
    few, more, most = (peak("GPipe", n) for n in (4, 6, 8))
    assert most - more == more - few > 4 * buffers


def test_ddp_holds_gradients_twice():
    config = load(DENSE, replicate=2, shard=1)
    ddp, alone = recovery(dry_run(config, 2)), recovery(dry_run(load(DENSE, shard=1), 1))
    gradients = 4 * sum(parameter.numel() for parameter in shapes_of(config).values())
    assert ddp.optimizer == alone.optimizer
    assert ddp.peak - alone.peak == pytest.approx(gradients, abs=100)


def test_context_parallelism_divides_the_sequence():
    """Besides, it gathers keys and values; FSDP divides parameters among the same ranks."""
    args = ["--training.local_batch_size=8", "--activation_checkpoint.mode=none"]
    whole = dry_run(load(DENSE, *args, "--training.seq_len=256", shard=4), 4)
    parts = dry_run(load(DENSE, *args, "--training.seq_len=512", shard=2, cp=2), 4)
    assert recovery(parts).rest == pytest.approx(recovery(whole).rest, rel=0.05)
    assert recovery(parts).optimizer == recovery(whole).optimizer


@pytest.fixture
def deep(monkeypatch):
    """The tiny MoE of 12 layers, so that what a layer keeps outweighs what it needs for a while."""
    flavor = load(MOE).model.flavor
    args = dataclasses.replace(qwen3_args[flavor], n_layers=12)
    monkeypatch.setitem(qwen3_args, flavor, args)
    return args


@pytest.mark.parametrize("degree", [2, 4])
def test_the_worst_case_is_the_tokens_that_can_come(deep, degree):
    args = ["--activation_checkpoint.mode=none", "--training.local_batch_size=16"]
    run = dry_run(load(MOE, *args, shard=4, ep=degree), 4)
    tokens, top_k = 16 * 64, deep.moe_args.top_k
    of_token = min(top_k, deep.moe_args.num_experts // degree)
    more = degree * tokens * of_token - tokens * top_k
    # of a row, in bfloat16: the input, and four hidden tensors for backward; its index in int32
    of_row = 2 * deep.dim + 4 * 2 * deep.moe_inter_dim + 4
    for stage, memory in run.memory.items():
        added = run.worst_case[stage].peak - memory.peak
        assert added == pytest.approx(deep.n_layers * more * of_row, rel=0.05)


@pytest.mark.parametrize("degrees", [{"shard": 4}, {"shard": 4, "ep": 2}])
def test_experts_get_padded_rows(monkeypatch, degrees):
    rows = []
    run_experts = moe._run_experts_grouped_mm

    def spy(w1, w2, w3, x, counts):
        rows.append((w1.shape[0], x.shape[0]))
        return run_experts(w1, w2, w3, x, counts)

    monkeypatch.setattr(moe, "_run_experts_grouped_mm", spy)
    args = [] if "ep" in degrees else ["--activation_checkpoint.mode=full"]
    config = load(MOE, *args, **degrees)
    flavor = dataclasses.replace(qwen3_args[config.model.flavor])
    flavor.moe_args = dataclasses.replace(flavor.moe_args, use_grouped_mm=True)
    monkeypatch.setitem(qwen3_args, config.model.flavor, flavor)
    run = dry_run(config, 4)
    choices, experts = 4 * 64 * 2, 4 // degrees.get("ep", 1)
    balanced = (experts, choices + 8 * experts)
    worst = (experts, 2 * choices + 8 * experts)
    assert not run.untraced and set(rows) == ({balanced, worst} if run.worst_case else {balanced})


def test_splits_of_the_all_to_all():
    routing = Routing(top_k=4)
    assert routing.splits(800, 8, 16) == ([100] * 8, [100] * 8)
    routing.worst = True
    assert routing.splits(800, 8, 16) == ([800] + [0] * 7, [800] * 8)
    # a rank has 2 experts, and a token of 4 choices sends 2 of them there
    sent, received = routing.splits(800, 8, 2)
    assert sent[0] == 400 and sum(sent) == 800 and received == [400] * 8


def test_degrees_of_1_change_nothing():
    plain = dry_run(load(MOE, shard=4), 4)
    ones = dict.fromkeys(("pp", "replicate", "cp", "tp", "ep", "etp"), 1)
    assert dry_run(load(MOE, shard=4, **ones), 4) == plain
    assert not plain.worst_case


@pytest.mark.parametrize(("path", "name"), [(MOE, "ep"), (DENSE, "tp"), (DENSE, "cp")])
def test_a_larger_degree_needs_no_more_states(path, name):
    """On twice the ranks, as FSDP's degree stays. Experts are divided by FSDP's alone."""
    states = []
    for size in (1, 2):
        ranks = 2 if name == "ep" else 2 * size
        run = dry_run(load(path, "--training.local_batch_size=4", shard=2, **{name: size}), ranks)
        states.append(recovery(run).optimizer)
    assert states[1] <= states[0]


def test_deepep_is_named_as_left_out():
    """It is simulated as the standard backend."""
    args = ["--model.name=deepseek_v3", "--model.flavor=debugmodel"]
    args += ["--parallelism.expert_parallel_comm_backend=deepep"]
    run = dry_run(load(MOE, *args, shard=4, ep=2), 4, simulate=False)
    assert run.left_out == ("parallelism.expert_parallel_comm_backend",)


def test_a_line_of_a_job_names_the_worst_case_and_the_pipeline_rank():
    def line(path, ranks, *args):
        base = [f"--job.config_file={ROOT / 'train_configs' / path}.toml"]
        base += ["--training.local_batch_size=4", "--validation.no-enable"]
        text, fits = trials.try_job([*base, *args], ranks, GPUS["B200"], simulate=True)
        assert fits
        return text

    expert = line(MOE, 4, "--parallelism.expert_parallel_degree=2")
    assert "recovery 0.0 GB, at worst 0.0 GB" in expert
    staged = line(DENSE, 2, "--parallelism.pipeline_parallel_degree=2")
    assert "recovery 0.0 GB on pipeline rank 1" in staged
    assert "at worst" not in staged
