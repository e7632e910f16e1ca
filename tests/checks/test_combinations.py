"""What must fit together in TorchTitan's sections, and what the machine must have."""

import pytest
import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.models.llama3 import llama3_args
from torchtitan.protocols.model_converter import _registry_model_converter_cls

from torchtitan.experiments.tst.checks import machine
from torchtitan.experiments.tst.checks.job import check_config
from torchtitan.experiments.tst.checks.machine import check_launch, check_machine
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.errors import ConfigError

PP2 = "--parallelism.pipeline_parallel_degree=2"
PP4 = "--parallelism.pipeline_parallel_degree=4"
TP2, CP2 = "--parallelism.tensor_parallel_degree=2", "--parallelism.context_parallel_degree=2"
EP2, COMPILE = "--parallelism.expert_parallel_degree=2", "--compile.enable"
QWEN3 = ("--model.name=qwen3", "--model.flavor=debugmodel_tiny")
MOE = ("--model.name=qwen3", "--model.flavor=debugmodel_moe_tiny")
SIX = "--model.flavor=debugmodel"  # layers
FLEX, VARLEN = "--model.flavor=debugmodel_flex_attn", "--model.flavor=debugmodel_varlen_attn"
SCHEDULE = "--parallelism.pipeline_parallel_schedule="
FLOAT8, MX = "quantize.linear.float8", "quantize.linear.mx"


def parse(*args):
    return SuperpositionConfigManager().parse_args(
        ["--model.flavor=demo", "--training.seq_len=64", *args]
    )


def check(*args, ranks=1):
    check_config(parse(*args), ranks)


@pytest.mark.parametrize(
    ("args", "ranks", "key", "value", "allowed"),
    [
        (["--fault_tolerance.enable"], 1, "fault_tolerance.enable", True, "experiments.ft"),
        (["--memory_estimation.enable"], 1, "memory_estimation.enable", True, "`tst plan`"),
        (["--comm.mode=local_tensor"], 1, "comm.mode", "local_tensor", "use fake_backend"),
        (
            ["--experimental.custom_args_module=os"],
            1,
            "experimental.custom_args_module",
            "os",
            "job.custom_config_module",
        ),
        (
            ["--experimental.custom_import=no.such"],
            1,
            "experimental.custom_import",
            "no.such",
            "cannot be imported: ModuleNotFoundError: No module named 'no'",
        ),
        (
            ["--profiling.enable_profiling", "--profiling.profile_freq=3"],
            1,
            "profiling.profile_freq",
            3,
            "at least 4",
        ),
        (["--optimizer.name=adamw"], 1, "optimizer.name", "adamw", "Adam, AdamW"),
        (
            ["--optimizer.early_step_in_backward", PP2],
            2,
            "optimizer.early_step_in_backward",
            True,
            "pipeline_parallel_degree = 2",
        ),
        (
            ["--lr_scheduler.total_steps=9", "--training.steps=10"],
            1,
            "lr_scheduler.total_steps",
            9,
            "at least training.steps = 10",
        ),
        (["--model.converters=float8"], 1, "model.converters", ["float8"], f"now {FLOAT8!r}"),
        (["--model.converters=fp4"], 1, "model.converters", ["fp4"], FLOAT8),
        (
            [f"--model.converters={FLOAT8},quantize.grouped_mm.mx"],
            1,
            "model.converters",
            [FLOAT8, "quantize.grouped_mm.mx"],
            "one kind: float8 or mx",
        ),
        (
            [
                f"--model.converters={FLOAT8}",
                f"--{FLOAT8}.recipe_name=rowwise",
                f"--{FLOAT8}.enable_fsdp_float8_all_gather",
            ],
            1,
            f"{FLOAT8}.enable_fsdp_float8_all_gather",
            True,
            "recipe_name = 'rowwise'",
        ),
        (
            ["--model.converters=quantize.grouped_mm.float8", CP2],
            2,
            "model.converters",
            ["quantize.grouped_mm.float8"],
            "context_parallel_degree = 2",
        ),
        (
            ["--activation_checkpoint.mode=memory_budget"],
            1,
            "activation_checkpoint.mode",
            "memory_budget",
            "needs compile.enable",
        ),
        (
            ["--parallelism.enable_async_tensor_parallel", TP2],
            2,
            "parallelism.enable_async_tensor_parallel",
            True,
            "needs compile.enable",
        ),
        ([f"--model.converters={MX}", TP2, COMPILE], 2, "model.converters", [MX], "tensor"),
        ([COMPILE, "--compile.backend=nvcc"], 1, "compile.backend", "nvcc", "inductor"),
        (
            ["--training.dataloader.persistent_workers"],
            1,
            "training.dataloader.persistent_workers",
            True,
            "num_workers above 0",
        ),
        (
            ["--validation.dataloader.prefetch_factor=2"],
            1,
            "validation.dataloader.prefetch_factor",
            2,
            "num_workers above 0",
        ),
        (
            [VARLEN, CP2],
            2,
            "parallelism.context_parallel_degree",
            2,
            "llama3 supports it for sdpa, flex",
        ),
        (
            [CP2, "--parallelism.context_parallel_load_balancer=ptrr"],
            2,
            "parallelism.context_parallel_load_balancer",
            "ptrr",
            "needs flex attention",
        ),
        (
            [*MOE, EP2, "--parallelism.expert_parallel_comm_backend=deepep"],
            2,
            "parallelism.expert_parallel_comm_backend",
            "deepep",
            "standard",
        ),
        (["--load_balance.method=bias"], 1, "load_balance.method", "bias", "has no experts"),
        ([SCHEDULE + "2F2B"], 1, "parallelism.pipeline_parallel_schedule", "2F2B", "1F1B"),
        (
            [PP2, "--parallelism.pipeline_parallel_schedule_csv=/none"],
            2,
            "parallelism.pipeline_parallel_schedule_csv",
            "/none",
            "no such file",
        ),
        ([PP4 + "0"], 40, "parallelism.pipeline_parallel_degree", 40, "of 2 layers"),
        (
            [PP2, "--parallelism.pipeline_parallel_layers_per_stage=1"],
            2,
            "parallelism.pipeline_parallel_layers_per_stage",
            1,
            "makes 4 stages on 2 ranks",
        ),
        (
            [
                *(SIX, PP2, SCHEDULE + "ZBVZeroBubble"),
                "--parallelism.pipeline_parallel_layers_per_stage=1",
            ],
            2,
            "parallelism.pipeline_parallel_layers_per_stage",
            1,
            "needs 2 stages",
        ),
        (["--training.enable_cpu_offload"], 1, "training.enable_cpu_offload", True, "needs FSDP"),
        (["--training.enable_cpu_offload", TP2], 2, "training.enable_cpu_offload", True, "FSDP"),
        (
            ["--checkpoint.create_seed_checkpoint"],
            1,
            "checkpoint.create_seed_checkpoint",
            True,
            "needs checkpoint.enable",
        ),
        (
            ["--checkpoint.create_seed_checkpoint", "--checkpoint.enable"],
            2,
            "checkpoint.create_seed_checkpoint",
            True,
            "needs 1 rank, not 2",
        ),
    ],
)
def test_what_does_not_fit_together(args, ranks, key, value, allowed):
    with pytest.raises(ConfigError) as error:
        check(*args, ranks=ranks)
    message = str(error.value)
    assert message.startswith(f"{key} = {value!r}: ")
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("args", "ranks"),
    [
        (["--lr_scheduler.total_steps=10", "--training.steps=10"], 1),
        (["--profiling.profile_freq=1"], 1),
        (["--model.converters=quantize.linear.float8,quantize.grouped_mm.float8"], 1),
        ([f"--model.converters={MX}", TP2], 2),
        (["--activation_checkpoint.mode=memory_budget", COMPILE], 1),
        (["--parallelism.enable_async_tensor_parallel"], 1),
        ([COMPILE, "--compile.backend=aot_eager"], 1),
        ([FLEX, CP2, "--parallelism.context_parallel_load_balancer=ptrr"], 2),
        ([CP2, "--parallelism.context_parallel_load_balancer=None"], 2),
        ([*MOE, "--parallelism.expert_parallel_comm_backend=deepep"], 1),
        ([SIX, PP2, SCHEDULE + "gpipe"], 2),
        ([SIX, PP2, SCHEDULE + "Interleaved1F1B"], 2),
        ([SIX, PP4, SCHEDULE + "InterleavedZeroBubble"], 4),
        ([SIX, PP2, SCHEDULE + "ZBVZeroBubble"], 2),
        ([SIX, PP2, "--parallelism.pipeline_parallel_layers_per_stage=4"], 2),
        (["--training.enable_cpu_offload"], 2),
        (["--training.enable_cpu_offload", CP2], 2),
        (["--checkpoint.create_seed_checkpoint", "--checkpoint.enable"], 1),
        (["--training.dataloader.num_workers=1", "--training.dataloader.prefetch_factor=2"], 1),
    ],
)
def test_what_fits_together(args, ranks):
    check(*args, ranks=ranks)


def test_names_that_an_extension_registers(tmp_path, monkeypatch):
    """A model with an optimizer of its own, and a converter."""
    (tmp_path / "extension_of_mine.py").write_text(
        "import dataclasses\n"
        "from torchtitan.models.llama3 import get_train_spec\n"
        "from torchtitan.protocols import model_converter, train_spec\n"
        "class Converter: pass\n"
        "model_converter.register_model_converter(Converter, 'of_mine')\n"
        "spec = dataclasses.replace(get_train_spec(), build_optimizers_fn=print,\n"
        "    build_validator_fn=None)\n"
        "train_spec.register_train_spec('of_mine', spec)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(train_spec_module, "_extra_train_specs", {})
    monkeypatch.delitem(_registry_model_converter_cls, "of_mine", raising=False)
    extended = ["--experimental.custom_import=extension_of_mine", "--model.name=of_mine"]
    extended += ["--model.converters=of_mine", "--optimizer.name=muon"]
    check(*extended)
    with pytest.raises(ConfigError, match=r"model.name = 'of_mine' has no validation"):
        check(*extended, "--validation.enable", "--validation.seq_len=64")
    del _registry_model_converter_cls["of_mine"]


@pytest.mark.parametrize(
    ("args", "key", "needs"),
    [
        ([f"--model.converters={FLOAT8}"], "model.converters", "capability 8.9"),
        (
            [f"--model.converters={FLOAT8}", f"--{FLOAT8}.emulate", COMPILE],
            "model.converters",
            "emulate = true without compile.enable",
        ),
        ([f"--model.converters={MX}"], "model.converters", "B200"),
        (["--model.converters=quantize.grouped_mm.mx"], "model.converters", "capability 10.0"),
        (["--profiling.enable_memory_snapshot"], "profiling.enable_memory_snapshot", "accelerator"),
    ],
)
def test_what_this_machine_does_not_have(monkeypatch, args, key, needs):
    monkeypatch.setattr(machine, "device_type", "cpu")
    monkeypatch.setattr(machine, "has_cuda_capability", lambda major, minor: False)
    config = parse(*args)
    check_config(config, 1)  # it may run elsewhere
    with pytest.raises(ConfigError, match=rf"^{key} = .*{needs}"):
        check_machine(config)


def test_what_a_machine_with_a_gpu_has(monkeypatch):
    monkeypatch.setattr(machine, "device_type", "cuda")
    monkeypatch.setattr(machine, "has_cuda_capability", lambda *least: least <= (10, 0))
    for name in _registry_model_converter_cls:
        check_machine(parse(f"--model.converters={name}", "--profiling.enable_memory_snapshot"))
    monkeypatch.setattr(machine, "_is_installed", lambda package: False)
    with pytest.raises(ConfigError, match=r"quantize.linear.mx needs the package torchao"):
        check_machine(parse(f"--model.converters={MX}"))
    with pytest.raises(ConfigError, match=r"enable_wandb = True: needs the package wandb: pip"):
        check_machine(parse("--metrics.enable_wandb"))


def test_a_process_without_a_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    check_launch(parse())
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK: not set in the environment; start the"):
        check_launch(parse())
    check_launch(parse("--comm.mode=fake_backend"))


def test_there_are_six_layers_and_two():
    """Which the stages above are made of."""
    assert (llama3_args["debugmodel"].n_layers, llama3_args["demo"].n_layers) == (6, 2)
