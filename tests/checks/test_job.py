import dataclasses
import os

import pytest
import tomli_w
from torchtitan.config.manager import custom_registry

import launches
from jobs import TST
from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.config.layout import ranks_of_layout
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.config.sections import Superposition
from torchtitan.experiments.tst.core import LOSSES, MODES, SCALES, WEIGHTINGS, Schedule
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.testing import ranks
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

ON = ("--superposition.bag_size=4", "--superposition.steps=2")

PP = "--parallelism.pipeline_parallel_degree=2"
TP_AND_CP = (
    "--parallelism.tensor_parallel_degree=2",
    "--parallelism.context_parallel_degree=4",
)
QWEN3 = ("--model.name=qwen3", "--model.flavor=debugmodel_tiny")

MOE = ("--model.name=qwen3", "--model.flavor=debugmodel_moe_tiny")
EXPERTS_ON_4 = ("--parallelism.expert_parallel_degree=4",)


def section(**values):
    return [f"--superposition.{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize(
    ("args", "key", "value", "allowed"),
    [
        (section(bag_size=0), "superposition.bag_size", 0, "at least 1"),
        (section(bag_size=-3), "superposition.bag_size", -3, "at least 1"),
        (section(bag_size=4), "superposition.bag_size", 4, "needs superposition.step_ratio"),
        (section(bag_size=4, step_ratio=1.0), "superposition.step_ratio", 1.0, "in [0, 1)"),
        (section(bag_size=4, step_ratio=-0.1), "superposition.step_ratio", -0.1, "in [0, 1)"),
        (section(bag_size=4, step_ratio="nan"), "superposition.step_ratio", "nan", "in [0, 1)"),
        (section(bag_size=4, step_ratio=0.3, steps=2), "superposition.steps", 2, "one of the two"),
        (section(bag_size=4, steps=-1), "superposition.steps", -1, "at least 0"),
        (section(bag_size=4, steps=6), "superposition.steps", 6, "fewer than training.steps = 6"),
        (section(bag_size=4, step_ratio=0.99), "superposition.step_ratio", 0.99, "training.steps"),
        (
            [*ON, *section(loss="bce", weighting="power_law")],
            "superposition.weighting",
            "'power_law'",
            '"uniform"',
        ),
        (
            [*ON, *section(mode="output", scale="batch")],
            "superposition.scale",
            "'batch'",
            '"sequence"',
        ),
        (
            [*ON, *section(reinit_at_recovery="norm")],
            "superposition.reinit_at_recovery",
            ["norm"],
            "tok_embeddings, output",
        ),
        (
            [*ON, *section(scale="batch"), "--training.seq_len=33"],
            "training.seq_len",
            33,
            "must be a multiple of the bag size 4",
        ),
        ([*ON, "--training.seq_len=0"], "training.seq_len", 0, "at least 1"),
        (
            [*section(bag_size=64, steps=2, mode="output")],
            "superposition.bag_size",
            64,
            "training.seq_len = 32",
        ),
        (
            [*ON, "--training.seq_len=33", "--parallelism.tensor_parallel_degree=2"],
            "training.seq_len",
            33,
            "tensor_parallel_degree = 2",
        ),
        (
            [*ON, "--validation.enable", "--validation.seq_len=64"],
            "validation.seq_len",
            64,
            "must be at most training.seq_len = 32",
        ),
        (
            ["--validation.enable", "--validation.seq_len=30", *TP_AND_CP],
            "validation.seq_len",
            30,
            "must be a multiple of 16",
        ),
        (["--training.seq_len=31"], "training.seq_len", 31, "31 latents, which must be a multiple"),
        (
            [*ON, "--training.dataloader.num_workers=2"],
            "training.dataloader.num_workers",
            2,
            "must be 0 or 1",
        ),
        (
            [
                *("--validation.enable", "--validation.seq_len=32"),
                "--validation.dataloader.num_workers=2",
            ],
            "validation.dataloader.num_workers",
            2,
            "must be 0",
        ),
        (
            [*ON, "--training.seq_len=34", "--parallelism.context_parallel_degree=2"],
            "training.seq_len",
            34,
            "34 latents, which must be a multiple of 4",
        ),
        (
            [*section(bag_size=4, steps=2, scale="batch"), *TP_AND_CP],
            "training.seq_len",
            32,
            "8 latents, which must be a multiple of 16",
        ),
        (
            [*QWEN3, "--parallelism.pipeline_parallel_degree=2"],
            "parallelism.pipeline_parallel_degree",
            2,
            "TorchTitan has no pipeline for model.name = 'qwen3'",
        ),
        ([PP, "--comm.mode=fake_backend"], "comm.mode", "'fake_backend'", "does not support"),
        (
            [PP, "--parallelism.pipeline_parallel_microbatch_size=3"],
            "parallelism.pipeline_parallel_microbatch_size",
            3,
            "must divide training.local_batch_size = 4",
        ),
        (
            [
                *(PP, "--validation.enable", "--validation.seq_len=32"),
                "--validation.local_batch_size=6",
            ],
            "validation.local_batch_size",
            6,
            "must be a multiple of 4, the pipeline's number of microbatches",
        ),
        (
            ["--resilience.max_skipped_steps=1", "--optimizer.early_step_in_backward"],
            "resilience.max_skipped_steps",
            1,
            "must be 0",
        ),
        (
            ["--resilience.max_skipped_steps=-1"],
            "resilience.max_skipped_steps",
            -1,
            "at least 0",
        ),
        (["--lm_head.chunks=0"], "lm_head.chunks", 0, "at least 1"),
        (
            ["--lm_head.chunks=8", PP],
            "lm_head.chunks",
            8,
            "parallelism.pipeline_parallel_microbatch_size",
        ),
        (
            ["--lm_head.chunks=8", "--model.converters=quantize.linear.float8"],
            "lm_head.chunks",
            8,
            "if the LM head is quantized",
        ),
        (
            ["--checkpoint.async_mode=async_with_pinned_mem"],
            "checkpoint.async_mode",
            "'async_with_pinned_mem'",
            "needs an accelerator",
        ),
        (
            [*ON, "--superposition.stop_at_boundary"],
            "superposition.stop_at_boundary",
            True,
            "checkpoint.enable",
        ),
        (
            ["--superposition.stop_at_boundary", "--checkpoint.enable"],
            "superposition.stop_at_boundary",
            True,
            "needs superposition steps",
        ),
        (
            ["--parallelism.data_parallel_shard_degree=8"],
            "parallelism.data_parallel_shard_degree",
            8,
            "needs 8 ranks, but there are 1; change the number of ranks or a degree (-1 uses",
        ),
        (
            ["--parallelism.data_parallel_replicate_degree=2"],
            "parallelism.data_parallel_shard_degree",
            -1,
            "needs a multiple of 2 ranks, but there are 1",
        ),
        (
            [*MOE, "--parallelism.expert_parallel_degree=3"],
            "parallelism.expert_parallel_degree",
            3,
            "must divide the 4 experts",
        ),
        (
            [*MOE, *EXPERTS_ON_4, "--parallelism.data_parallel_shard_degree=2"],
            "parallelism.expert_parallel_degree",
            4,
            "must divide 2, the product of parallelism.data_parallel_shard_degree,",
        ),
        (
            [*MOE, *EXPERTS_ON_4, "--parallelism.expert_tensor_parallel_degree=2"],
            "parallelism.expert_tensor_parallel_degree",
            2,
            "must be 1 or parallelism.tensor_parallel_degree = 1",
        ),
        (
            [*MOE, *EXPERTS_ON_4],
            "parallelism.data_parallel_shard_degree",
            -1,
            "needs a multiple of 4 ranks, but there are 1",
        ),
        (["--training.global_batch_size=6"], "training.global_batch_size", 6, "a multiple of 4"),
        (["--model.name=gpt2"], "model.name", "'gpt2'", "not registered"),
        (["--model.flavor=demo2"], "model.flavor", "'demo2'", "demo"),
        (["--training.dataset=pile"], "training.dataset", "'pile'", "jsonl"),
        (
            ["--training.dataset_path=/none.jsonl"],
            "training.dataset_path",
            "'/none.jsonl'",
            "no such file",
        ),
        (
            ["--training.dataset=c4_test", "--training.dataset_path=None"],
            "training.dataset_path",
            "'tests/assets/c4_test'",
            "no such file",
        ),
        (
            ["--training.dataset=c4", "--training.dataset_path=README.md"],
            "training.dataset_path",
            "'README.md'",
            "set training.dataset to jsonl or parquet",
        ),
        (
            ["--training.dataset=c4", "--training.dataset_path=/none"],
            "training.dataset_path",
            "'/none'",
            "no such file",
        ),
        (
            ["--validation.enable", "--validation.dataset=jsonl", "--validation.seq_len=32"],
            "validation.dataset_path",
            "''",
            "give a file or a folder",
        ),
        (["--model.hf_assets_path=/none"], "model.hf_assets_path", "'/none'", "no such folder"),
        (["--model.hf_assets_path=/"], "model.hf_assets_path", "'/'", "tokenizer.json"),
    ],
)
def test_bad_input_names_key_value_and_what_is_allowed(make_config, args, key, value, allowed):
    config = make_config(*args)
    with pytest.raises(ConfigError) as error:
        # without a launch's environment, which anything past the checks would ask for
        SuperpositionTrainer(config)
    message = str(error.value)
    assert f"{key} = {value}" in message
    assert allowed in message


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        ({"bag_sise": 4}, "bag_sise", 4, "did you mean bag_size?"),
        ({"step_ration": 0.3}, "step_ration", 0.3, "did you mean step_ratio?"),
        ({"temperature": 1}, "temperature", 1, "known keys are bag_size, "),
        ({"bag_size": "4"}, "bag_size", "'4'", "an integer"),
        ({"bag_size": 4.0}, "bag_size", 4.0, "an integer"),
        ({"bag_size": True}, "bag_size", True, "an integer"),
        ({"steps": 2.5}, "steps", 2.5, "an integer"),
        ({"step_ratio": "0.3"}, "step_ratio", "'0.3'", "a number"),
        ({"mode": "both"}, "mode", "'both'", "full, input, output"),
        ({"loss": "mse"}, "loss", "'mse'", "mce, mce_alt, bce, hinge"),
        ({"weighting": "linear"}, "weighting", "'linear'", "uniform, power_law"),
        ({"scale": "length"}, "scale", "'length'", "sequence, batch"),
        ({"reinit_at_recovery": "output"}, "reinit_at_recovery", "'output'", "a list"),
    ],
)
def test_bad_toml(tmp_path, section, key, value, allowed):
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps({"superposition": section}))
    with pytest.raises(ConfigError) as error:
        SuperpositionConfigManager().parse_args([f"--job.config_file={path}"])
    message = str(error.value)
    assert f"superposition.{key} = {value}" in message
    assert allowed in message


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("skip_damage", True, "did you mean skip_damaged?"),
        ("skip_damaged", 1, "true or false"),
        ("max_skipped_steps", "2", "an integer"),
    ],
)
def test_bad_resilience_section(tmp_path, key, value, allowed):
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps({"resilience": {key: value}}))
    with pytest.raises(ConfigError) as error:
        SuperpositionConfigManager().parse_args([f"--job.config_file={path}"])
    assert f"resilience.{key} = {value!r}: " in str(error.value)
    assert allowed in str(error.value)


def test_tokenizer_larger_than_the_model(make_config, monkeypatch):
    from torchtitan.models.llama3 import llama3_args

    small = dataclasses.replace(llama3_args["demo"], vocab_size=1000)
    monkeypatch.setitem(llama3_args, "small", small)
    with pytest.raises(ConfigError, match=r"1,024 entries, more than the 1,000 of model.flavor"):
        check_job(make_config("--model.flavor=small"))


def test_stops_before_any_device_or_process_group(base_args, tmp_path):
    """A launch without torchrun's environment: anything past the checks would ask for it."""
    args = [*base_args, *section(bag_size=0)]
    log = ranks.run_ranks(without_torchrun, 1, tmp_path, args)
    assert log.splitlines()[0] == "rank 0 ended with 2"
    assert log.splitlines()[-1].startswith("config error: superposition.bag_size = 0")
    assert "Traceback" not in log


def without_torchrun(args):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    launches.run_module(TST, args)


@pytest.mark.parametrize("path", ["None", "allenai/c4", "mirror/c4", "imdb"])
def test_names_on_the_hub_are_not_looked_for_on_disk(make_config, path):
    check_job(make_config("--training.dataset=c4", f"--training.dataset_path={path}"))


def test_block_causal_is_fine_where_single_tokens_go_in(make_config):
    check_job(
        make_config(*ON, "--superposition.mode=output", "--model.flavor=debugmodel_flex_attn")
    )


def test_command_line_goes_over_toml(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps({"superposition": {"bag_size": 6, "step_ratio": 0.3}}))
    config = SuperpositionConfigManager().parse_args(
        [f"--job.config_file={path}", "--superposition.bag_size", "8"]
    )
    assert config.superposition.bag_size == 8
    assert config.superposition.step_ratio == 0.3
    assert build_schedule(config) == Schedule.of([8], [3000])


def test_a_ratio_of_the_toml_can_be_replaced_by_steps(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps({"superposition": {"bag_size": 6, "step_ratio": 0.3}}))
    config = SuperpositionConfigManager().parse_args(
        [f"--job.config_file={path}", "--superposition.step_ratio=None", "--superposition.steps=7"]
    )
    assert build_schedule(config).boundary == 7


@pytest.mark.parametrize(
    ("degrees", "ranks"),
    [
        ({"expert": 8}, 8),
        ({"expert": 8, "tensor": 2}, 8),
        ({"expert": 8, "tensor": 2, "expert_tensor": 2}, 16),
        ({"expert": 2, "tensor": 4, "context": 2}, 8),
        ({"expert": 8, "pipeline": 2}, 16),
        ({"expert": 6, "tensor": 4}, 12),
    ],
)
def test_ranks_that_share_experts(degrees, ranks):
    args = [f"--parallelism.{kind}_parallel_degree={n}" for kind, n in degrees.items()]
    replicas = "--parallelism.data_parallel_replicate_degree=3"
    assert ranks_of_layout(SuperpositionConfigManager().parse_args(args)) == (ranks, True)
    config = SuperpositionConfigManager().parse_args([*args, replicas])
    assert ranks_of_layout(config) == (3 * ranks, True)


def test_choices_are_those_of_the_core():
    choices = {
        f.name: f.type.__args__
        for f in dataclasses.fields(Superposition)
        if hasattr(f.type, "__args__")
    }
    assert choices["mode"] == MODES
    assert choices["loss"] == LOSSES
    assert choices["weighting"] == WEIGHTINGS
    assert choices["scale"] == SCALES


def test_each_manager_parses_as_fast_as_the_first():
    """Upstream's adds a rule to tyro's, which is asked for each option."""

    def rules():
        SuperpositionConfigManager()
        return len(custom_registry._primitive_rules)

    assert rules() == rules()


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit):
        SuperpositionConfigManager().parse_args(["--help"])
    text = capsys.readouterr().out
    for f in dataclasses.fields(Superposition):
        assert f"--superposition.{f.name.replace('_', '-')}" in text
    assert "number of contiguous data tokens in a bag" in text
