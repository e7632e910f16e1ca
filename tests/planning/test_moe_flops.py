"""FLOPs of a latent of a mixture of experts, term by term from its shape, against TorchTitan's
count, which MFU and ``tst plan`` take, and against the operators that torch counts."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.qwen3 import Qwen3Model, qwen3_args

from jobs import ROOT
from torchtitan.experiments.tst import models
from torchtitan.experiments.tst.checks.model import model_on_meta
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.planning.plan import default_ranks, make_plan

models.register()
FORWARD_AND_BACKWARD = 3  # products: one of forward, two of backward
TINY, LARGE = qwen3_args["debugmodel_moe_tiny"], qwen3_args["10B-A1B"]


def by_hand(args, length):
    """Terms of one latent of ``length``, forward and backward; a multiplication and an addition are
    two."""
    heads, kv_heads, width = args.n_heads, args.n_kv_heads, args.head_dim
    experts = args.moe_args
    multiplications = {
        "queries": args.dim * heads * width,
        "keys": args.dim * kv_heads * width,
        "values": args.dim * kv_heads * width,
        "scores": heads * width * length,  # of all positions: causality is not made use of
        "weighted values": heads * width * length,
        "attention's output": heads * width * args.dim,
        "router": args.dim * experts.num_experts,
        "experts": experts.top_k * 3 * args.dim * args.moe_inter_dim,  # w1, w3 and w2
    }
    terms = {name: args.n_layers * number for name, number in multiplications.items()}
    terms["LM head"] = args.dim * args.vocab_size
    return {name: 2 * FORWARD_AND_BACKWARD * number for name, number in terms.items()}


def of_norms(args):
    """What TorchTitan adds: six for each weight of a norm, as if it were one of a product."""
    weights = args.n_layers * (2 * args.dim + 2 * args.head_dim) + args.dim
    return 6 * weights


def upstreams(name, length):
    file = {"10B-A1B": "paper/10B-A1B-50k-tst", "debugmodel_moe_tiny": "debug/qwen3_moe"}[name]
    path = ROOT / "train_configs" / f"{file}.toml"
    config = SuperpositionConfigManager().parse_args([f"--job.config_file={path}"])
    args, model = model_on_meta(config)
    return config, args.get_nparams_and_flops(model, length)[1]


@pytest.mark.parametrize(
    ("name", "args", "length"),
    [("10B-A1B", LARGE, 4096), ("10B-A1B", LARGE, 256), ("debugmodel_moe_tiny", TINY, 64)],
)
def test_upstreams_count_is_that_by_hand_and_the_norms(name, args, length):
    _, counted = upstreams(name, length)
    assert counted == sum(by_hand(args, length).values()) + of_norms(args)


def test_the_norms_are_nothing_at_the_papers_size():
    _, counted = upstreams("10B-A1B", 4096)
    assert of_norms(LARGE) == 337_920
    assert of_norms(LARGE) < 5e-5 * counted


def test_a_plan_takes_that_count():
    config, counted = upstreams("10B-A1B", 4096)
    plan = make_plan(config, default_ranks(config))
    for stage in plan.stages:
        assert stage.flops_per_step == 2**23 * counted


def test_the_terms_of_the_papers_size():
    """So that a change of the model's shape is seen here; in FLOPs of a latent of 4,096."""
    assert {name: round(number / 1e6) for name, number in by_hand(LARGE, 4096).items()} == {
        "queries": 302,
        "keys": 75,
        "values": 75,
        "scores": 1208,
        "weighted values": 1208,
        "attention's output": 302,
        "router": 19,
        "experts": 3624,
        "LM head": 933,
    }


def test_torch_counts_the_same_operators(monkeypatch):
    """And one more: a latent's experts are added up by a product with their scores."""
    # not a fused kernel, whose backward computes the scores again
    monkeypatch.setattr(ScaledDotProductAttentionWrapper, "sdpa_backends", [SDPBackend.MATH])
    sequences, length = 2, 64
    torch.manual_seed(0)
    model = Qwen3Model(replace(TINY, max_seq_len=length))  # a job of another test may have set it
    with torch.no_grad():
        model.init_weights(torch.device("cpu"))
    tokens = torch.randint(TINY.vocab_size, (sequences, length))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    combined = TINY.n_layers * 6 * TINY.moe_args.top_k * TINY.dim
    of_latent = sum(by_hand(TINY, length).values()) + combined
    assert counter.get_total_flops() == sequences * length * of_latent
