"""The auxiliary loss of the experts on TorchTitan 0.3, and their metrics."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from jobs_of_03 import B, L, built, ordinary, train, tst
from jobs_of_both import args
from test_layouts_of_03 import NEW_TORCH, QWEN3_MOE, launch
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from torchtitan.experiments.tst.config.sections import LoadBalance
from torchtitan.experiments.tst.core import load_balancing_loss
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.expert_metrics import AUXILIARY_LOSS, LARGEST
from torchtitan.experiments.tst.metrics_file import TRAINING_LOSS, read_metrics
from torchtitan.experiments.tst.titan03 import checks
from torchtitan.experiments.tst.titan03.job import to_config
from torchtitan.experiments.tst.titan03.job_config import read
from torchtitan.experiments.tst.titan03.models import model_spec

COEFFICIENT = 0.5  # at which the auxiliary loss has a part in every gradient
BALANCE = LoadBalance("auxiliary_loss", COEFFICIENT)
EXPERTS, TOP_K = 8, 2
ON = ("--load_balance.method=auxiliary_loss", f"--load_balance.coefficient={COEFFICIENT}")


def moe(folder, corpus, **training):
    """A job of the demo's model with experts, which compute in float32."""
    config = ordinary(folder, corpus, "qwen3_moe", **training)
    config.model_spec = model_spec("qwen3", "demo_moe", seq_len=L)
    vocabulary = config.model_spec.model.vocab_size
    config.loss = dataclasses.replace(config.loss, global_vocab_size=vocabulary)
    config.activation_checkpoint = None
    return config


def balanced(config, **keys):
    return tst(config, load_balance=BALANCE, **keys)


def gradients(config, patch=None):
    """Gradients and totals of the first step; ``patch`` adds the loss in plain PyTorch."""
    logits, chosen = [], []
    with built(config) as trainer:
        model = trainer.model_parts[0]
        if patch:
            for layer in model.layers.values():
                router = layer.moe.router
                router.gate.register_forward_hook(lambda m, a, out: logits.append(out))
                router.register_forward_hook(lambda m, a, out: chosen.append(out[1]))
            cls = type(trainer.loss_fn)
            plain = cls.__call__

            def loss(*arguments, **kwargs):
                language, metrics = plain(*arguments, **kwargs)
                for of_layer, choices in zip(logits, chosen, strict=True):
                    shares = F.one_hot(choices, EXPERTS).float().mean((0, 1, 2))
                    means = F.softmax(of_layer, -1).mean((0, 1))
                    language = language + COEFFICIENT * EXPERTS * (shares * means).sum()
                return language, metrics

            patch.setattr(cls, "__call__", loss)
        found = []
        trainer.optimizers.step = lambda: found.extend(
            (name, parameter.grad.full_tensor().clone())
            for name, parameter in model.named_parameters()
        )
        trainer.step = 1
        trainer.train_step(trainer.batch_generator(trainer.dataloader))
        totals = trainer.load_balancer.load.totals() if trainer.load_balancer else None
    return dict(found), totals


@pytest.mark.parametrize("bag_size", [1, 4])
def test_the_gradient_is_that_of_plain_pytorch(bag_size, tmp_path, corpus):
    config = moe(tmp_path, corpus, max_norm=1e9)
    with pytest.MonkeyPatch.context() as patch:
        expected, _ = gradients(tst(config, bag_size=bag_size), patch)
    without, _ = gradients(tst(config, bag_size=bag_size))
    found, (counts, sums) = gradients(balanced(config, bag_size=bag_size))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    gate = next(name for name in found if "router.gate" in name)
    assert not torch.allclose(found[gate], without[gate], rtol=1e-2)
    layers = counts.shape[0]
    assert counts.sum(1).tolist() == [TOP_K * B * L] * layers
    assert sums.sum(1).tolist() == pytest.approx([B * L] * layers)
    (line,) = read_metrics(tmp_path)
    assert line[AUXILIARY_LOSS] == pytest.approx(
        load_balancing_loss(counts, sums).mean().item(), rel=1e-6
    )


@pytest.mark.parametrize("recomputation", [FullAC, SelectiveAC])
def test_recomputation_counts_once(recomputation, tmp_path, corpus):
    lines = []
    for part in (None, recomputation.Config()):
        config = moe(tmp_path / str(part is None), corpus)
        config.activation_checkpoint = part
        train(balanced(config))
        lines.append(read_metrics(config.dump_folder))
    for key in (TRAINING_LOSS, "grad_norm", AUXILIARY_LOSS, LARGEST):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]], key


def test_micro_batches_and_validation(tmp_path, corpus):
    """The metrics are of the whole batch, and validation does not change a loss."""
    config = moe(tmp_path / "a", corpus, global_batch_size=2 * B)
    validated = dataclasses.replace(config, dump_folder=str(tmp_path / "b"))
    validated.validator = dataclasses.replace(config.validator, enable=True, freq=1, steps=1)
    runs = [train(balanced(job)).losses for job in (config, validated)]
    assert runs[0] == runs[1]
    for line in read_metrics(tmp_path / "a"):
        counts = line[f"{LARGEST}/layer_1"] / 100 * 2 * B * L * TOP_K
        assert counts == pytest.approx(round(counts), abs=1e-6)


def test_compiled_layers_train_the_same(tmp_path, corpus):
    runs = []
    for name in ("eager", "compiled"):
        config = moe(tmp_path / name, corpus, steps=4)
        if name == "compiled":
            config.activation_checkpoint = SelectiveAC.Config()
            config.compile = dataclasses.replace(
                config.compile, enable=True, components=["model"], backend="aot_eager"
            )
        train(balanced(config))
        runs.append(read_metrics(tmp_path / name))
    for key in (TRAINING_LOSS, "grad_norm", AUXILIARY_LOSS, LARGEST):
        expected = [line[key] for line in runs[0]]
        assert [line[key] for line in runs[1]] == pytest.approx(expected, rel=1e-5), key


@pytest.mark.slow
def test_losses_are_those_of_022(tmp_path, corpus, on_02):
    """From the same weights and tokens, in float32, across the boundary."""
    on_02("balanced_run_of_02.py", corpus, tmp_path, *ON)
    expected = read_metrics(tmp_path / "run")
    job = [*args(corpus, "qwen3_moe", tmp_path / "weights"), *ON]
    train(to_config(read([*job, f"--job.dump_folder={tmp_path / 'found'}"])))
    found = read_metrics(tmp_path / "found")
    for key in (TRAINING_LOSS, "grad_norm", AUXILIARY_LOSS, LARGEST, "experts/dead/layer_1"):
        values = [line[key] for line in expected]
        assert [line[key] for line in found] == pytest.approx(values, rel=1e-5, abs=1e-5), key


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory, corpus):
    """The first weights, and the metrics of one rank."""
    folder = tmp_path_factory.mktemp("one")
    launch(folder / "seed", 1, corpus, model=QWEN3_MOE, seed=True)
    weights = str(folder / "seed/checkpoint/step-0")
    options = {"model": QWEN3_MOE, "balance": ("auxiliary_loss", COEFFICIENT)}
    launch(folder / "run", 1, corpus, weights=weights, **options)
    return weights, read_metrics(folder / "run")


TP = {"tensor_parallel_degree": 2}
EP = {"expert_parallel_degree": 2}
LAYOUTS = {
    "FSDP": {},
    "HSDP": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1},
    "TP": TP | {"spmd_backend": "partial_dtensor"},
    "EP": EP,
    "TP, EP": TP | EP | {"spmd_backend": "partial_dtensor"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_balance_as_one(name, of_one_rank, corpus, tmp_path):
    if NEW_TORCH and "EP" in name:
        pytest.skip("gloo of torch 2.14 refuses EP")
    weights, expected = of_one_rank
    options = {"model": QWEN3_MOE, "balance": ("auxiliary_loss", COEFFICIENT)}
    launch(tmp_path, 2, corpus, weights=weights, layout=LAYOUTS[name], **options)
    found = read_metrics(tmp_path)
    for key in (TRAINING_LOSS, "grad_norm", AUXILIARY_LOSS, LARGEST):
        values = [line[key] for line in expected]
        assert [line[key] for line in found] == pytest.approx(values, rel=1e-5), key


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        ("llama3", {}, 'load_balance.method = .*must be "upstream": llama3 .* has no experts'),
        ("qwen3_moe", {"pipeline_parallel_degree": 2}, "pipeline_parallel_degree = 2: must be 1"),
        ("qwen3_moe", TP, "spmd_backend = .*must be partial_dtensor with load_balance.method"),
    ],
)
def test_a_config_that_cannot_be_balanced(model, layout, message, tmp_path, corpus):
    config = ordinary(tmp_path, corpus, model, disable_cuda_graphs=True)
    config.parallelism = dataclasses.replace(config.parallelism, **layout)
    with pytest.raises(ConfigError, match=message):
        checks.check_config(balanced(config))


def test_cuda_graphs_are_refused(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"training.disable_cuda_graphs = False: must be true"):
        checks.check_config(balanced(ordinary(tmp_path, corpus, "qwen3_moe")))
