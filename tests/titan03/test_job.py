"""The config of TorchTitan 0.3 for a job of 0.2.2: each key has its place, or is named."""

import logging
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.hf_datasets.text_datasets import DATASETS

from torchtitan.experiments.tst.config.sections import LoadBalance
from torchtitan.experiments.tst.config.values import kinds_of, type_of
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.titan03 import counterparts
from torchtitan.experiments.tst.titan03.job import to_config
from torchtitan.experiments.tst.titan03.job_config import JobConfig, keys_of, read
from torchtitan.experiments.tst.titan03.job_parts import LayerwiseAC
from torchtitan.experiments.tst.titan03.loss import PhaseLoss

KINDS = kinds_of(JobConfig)
PLACES = (set(counterparts.COPIED), counterparts.BUILT, set(counterparts.NO_EFFECT))


def job(**values: Any) -> Any:
    """A job with values such as ``training__steps=5``."""
    found = JobConfig()
    for name, value in values.items():
        put(found, name.replace("__", "."), value)
    return found


def put(found: Any, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        found = getattr(found, section)
    setattr(found, name, value)


def at(config: Any, place: str) -> Any:
    for name in place.split("."):
        config = getattr(config, name)
    return config


def test_each_key_has_one_place_or_none():
    for key in KINDS:
        places = sum(key in place for place in PLACES)
        assert places == 1 or (places == 0 and key in counterparts.WITHOUT), key
    assert set(KINDS) == set(counterparts.WITHOUT).union(*PLACES)


def other(key: str) -> Any:
    """Another value of a key than its default."""
    value, kind = keys_of(JobConfig())[key], type_of(KINDS[key])
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if choice != value), value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 3
    if isinstance(value, list):
        return value[:1] if value else ["dataloader"]
    return 3 if kind == (int | None) else 0.5 if kind == (float | None) else "another"


@pytest.mark.parametrize("key", counterparts.COPIED)
def test_a_value_arrives(key):
    place, needed = counterparts.COPIED[key], {}
    if key == "checkpoint.initial_load_in_hf_quantized":
        needed = {"checkpoint__initial_load_in_hf": True, "checkpoint__initial_load_path": "/a"}
    assert at(to_config(job()), place) == keys_of(JobConfig())[key]
    changed = job(**needed)
    value = "ptrr" if key == "parallelism.context_parallel_load_balancer" else other(key)
    put(changed, key, value)
    assert at(to_config(changed), place) == value


def test_keys_without_counterpart_are_named_together():
    with pytest.raises(ConfigError) as error:
        to_config(
            job(
                optimizer__early_step_in_backward=True,
                resilience__max_skipped_steps=3,
                superposition__reinit_at_recovery=["output"],
                superposition__bag_size=4,
                metrics__log_freq=7,
            )
        )
    assert str(error.value) == (
        "optimizer.early_step_in_backward = True (set it to false), "
        "superposition.reinit_at_recovery = ['output'] (use an empty list: this ablation needs "
        "TorchTitan 0.2.2), "
        "resilience.max_skipped_steps = 3 (use 0: 0.3 stops at a loss that is not finite): these "
        "keys have no counterpart in TorchTitan 0.3; change the job as shown, or use TorchTitan "
        "0.2.2"
    )


FLOAT8 = {"model__converters": [counterparts.FLOAT8]}
REFUSED: dict[str, dict[str, Any]] = {
    "job.custom_config_module": {"job__custom_config_module": "mine"},
    "experimental.custom_import": {"experimental__custom_import": "mine"},
    "experimental.custom_args_module": {"experimental__custom_args_module": "mine"},
    "model.flavor": {"model__flavor": "8B_flex", "training__dataset": "token_shards"},
    "model.converters": {"model__converters": ["quantize.linear.mx"]},
    "quantize.linear.float8.recipe_name": FLOAT8,
    "quantize.linear.float8.enable_fsdp_float8_all_gather": FLOAT8
    | {"quantize__linear__float8__enable_fsdp_float8_all_gather": True},
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": FLOAT8
    | {"quantize__linear__float8__precompute_float8_dynamic_scale_for_fsdp": True},
    "quantize.grouped_mm.float8.fqns": {"model__converters": [counterparts.FLOAT8_EXPERTS]},
    "optimizer.early_step_in_backward": {"optimizer__early_step_in_backward": True},
    "parallelism.expert_tensor_parallel_degree": {"parallelism__expert_tensor_parallel_degree": 2},
    "comm.mode": {"comm__mode": "fake_backend"},
    "memory_estimation.enable": {"memory_estimation__enable": True},
    "fault_tolerance.enable": {"fault_tolerance__enable": True},
    "superposition.reinit_at_recovery": {
        "superposition__reinit_at_recovery": ["output"],
        "superposition__bag_size": 4,
    },
    "resilience.skip_damaged": {"resilience__skip_damaged": True},
    "resilience.max_skipped_steps": {"resilience__max_skipped_steps": 1},
}


@pytest.mark.parametrize("key", counterparts.WITHOUT)
def test_a_key_without_counterpart_is_refused_if_it_changes_the_run(key):
    counterparts.check_counterparts(job())
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        counterparts.check_counterparts(job(**REFUSED[key]))


def test_a_key_that_changes_no_loss_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        counterparts.check_counterparts(job(activation_checkpoint__early_stop=True))
    (record,) = caplog.records
    assert record.getMessage() == (
        "activation_checkpoint.early_stop = True has no effect on TorchTitan 0.3: 0.3 never stops "
        "early"
    )


def test_the_optimizer_is_that_of_022():
    config = to_config(job(optimizer__name="Adam", optimizer__beta2=0.9, optimizer__eps=1e-6))
    (group,) = config.optimizer.param_groups
    assert (group.pattern, group.optimizer_name) == (".*", "Adam")
    options = {"lr": 8e-4, "betas": (0.9, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    assert group.optimizer_kwargs == options
    assert config.optimizer.implementation == "fused"


@pytest.mark.parametrize(
    ("mode", "option", "expected"),
    [
        ("selective", "2", LayerwiseAC.Config(every=2)),
        ("selective", "op", SelectiveAC.Config()),
        ("full", "2", FullAC.Config()),
        ("none", "2", None),
    ],
)
def test_activation_checkpointing(mode, option, expected):
    values = {"activation_checkpoint__mode": mode}
    config = to_config(job(activation_checkpoint__selective_ac_option=option, **values))
    assert config.activation_checkpoint == expected


def test_a_memory_budget_needs_compilation():
    values = {"activation_checkpoint__mode": "memory_budget"}
    with pytest.raises(ConfigError, match="refuses the job: ValueError: Memory budget"):
        to_config(job(**values))
    config = to_config(job(compile__enable=True, **values))
    assert config.activation_checkpoint == MemoryBudgetAC.Config(memory_budget=0.5)


def test_every_second_layer_is_recomputed():
    policy = LayerwiseAC.Config(every=2).build()
    layers = [torch.nn.Linear(1, 1) for _ in range(4)]
    wrapped = [policy._wrap_block(layer) is not layer for layer in layers]
    assert wrapped == [False, True, False, True]


def test_the_loss_is_cut_into_chunks():
    config = to_config(job(lm_head__chunks=4))
    assert isinstance(config.loss, ChunkedLossWrapper.Config)
    assert config.loss.num_chunks == 4 and isinstance(config.loss.loss_fn, PhaseLoss.Config)
    assert isinstance(to_config(job()).loss, PhaseLoss.Config)


def test_data():
    shards = {"training__dataset": "token_shards", "token_shards__paths": ["a", "b"]}
    config = to_config(
        job(
            **shards,
            token_shards__weights=[1.0, 2.0],
            token_shards__at_end="stop",
            training__dataloader__num_workers=2,
            validation__enable=True,
            validation__dataset="jsonl",
            validation__dataset_path="c.jsonl",
            validation__local_batch_size=5,
            validation__seq_len=64,
            text_dataset__text_key="content",
        )
    )
    found = config.dataloader
    assert (found.paths, found.weights, found.at_end) == (["a", "b"], [1.0, 2.0], "stop")
    assert found.num_workers == 2
    validator = config.validator
    assert (validator.enable, validator.batch_size, validator.length) == (True, 5, 64)
    text = validator.dataloader
    assert (text.dataset, text.dataset_path, text.infinite) == ("jsonl", "c.jsonl", False)
    assert DATASETS["jsonl"].loader.text_key == "content"
    assert to_config(job(training__dataset="c4_test")).dataloader.infinite
    with pytest.raises(ConfigError, match=r"training\.dataset = 'nothing': must be one of c4, "):
        to_config(job(training__dataset="nothing"))


def test_names_and_paths_are_those_of_03(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stages = [["tok_embeddings", "layers.0"], ["norm", "output"]]
    config = to_config(
        job(
            parallelism__module_fqns_per_model_part=stages,
            checkpoint__initial_load_path="seed",
        )
    )
    assert config.parallelism.module_fqns_per_model_part[1] == ["norm", "lm_head"]
    assert config.checkpoint.initial_load_path == str(tmp_path / "seed")


@pytest.mark.parametrize("method", ["upstream", "none", "auxiliary_loss"])
def test_experts_have_no_moving_bias_as_in_022(method):
    qwen3 = {"model__name": "qwen3", "model__flavor": "demo_moe"}
    assert (
        to_config(job(**qwen3, load_balance__method=method)).model_spec.post_optimizer_build_fn
        is None
    )


def test_experts_are_balanced_by_a_bias():
    qwen3 = {"model__name": "qwen3", "model__flavor": "demo_moe"}
    balance = {"load_balance__method": "bias", "load_balance__coefficient": 0.01}
    spec = to_config(job(**qwen3, **balance)).model_spec
    assert spec.post_optimizer_build_fn is not None
    assert {layer.moe.load_balance_coeff for layer in spec.model.layers} == {0.01}


def test_the_auxiliary_loss_is_that_of_the_job():
    section = to_config(
        job(load_balance__method="auxiliary_loss", load_balance__coefficient=0.1)
    ).load_balance
    assert section == LoadBalance("auxiliary_loss", 0.1)


def test_superposition_is_that_of_the_job():
    section = to_config(
        job(superposition__bag_size=[8, 2], superposition__steps=[3, 4])
    ).superposition
    assert (section.bag_size, section.steps, section.step_ratio) == ([8, 2], [3, 4], None)


def test_a_file_and_a_command_line(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[training]\nsteps = 7\n[training.dataloader]\nnum_workers = 1\n")
    arguments = ["--superposition.bag_size", "8,4,2", "--superposition.step_ratio=0.3"]
    switches = ["--checkpoint.enable", "--checkpoint.no-last_save_model_only"]
    found = read([f"--job.config_file={path}", *arguments, *switches, "--training.seq_len=64"])
    assert (found.training.steps, found.training.seq_len) == (7, 64)
    assert found.training.dataloader.num_workers == 1
    assert found.superposition.bag_size == [8, 4, 2]
    assert (found.checkpoint.enable, found.checkpoint.last_save_model_only) == (True, False)
    assert found.optimizer.lr == 8e-4, "the default of 0.2.2"


@pytest.mark.parametrize(
    ("toml", "arguments", "message"),
    [
        ("[training]\nstep = 1", [], "training.step = 1: unknown key; did you mean steps?"),
        ("[training]\nsteps = 'a'", [], "training.steps = 'a': must be an integer"),
        ("[training]\nsteps = 0", [], "training.steps = 0: must be an integer of at least 1"),
        ("", ["--training.steps=a"], "training.steps = 'a': must be an integer"),
        ("", ["--optimizer.lr=-1"], "optimizer.lr = -1.0: must be a finite number of at least 0"),
        ("", ["--superposition.bags=2"], "superposition.bags = '2': unknown key"),
        ("[superposition]\nbag_size = 0", [], "superposition.bag_size = 0: must be an integer"),
        ("[training]\nbatch_size = 1", [], "training.batch_size = 1 (now training.local_batch"),
        ("[", [], "is not TOML"),
    ],
)
def test_a_job_that_cannot_be_read(toml, arguments, message, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(toml)
    with pytest.raises(ConfigError) as error:
        read([f"--job.config_file={path}", *arguments])
    assert message in str(error.value)
