"""Every key of every section: a wrong type, a wrong choice and a number out of range stop a job."""

import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Literal, Union, get_args, get_origin

import pytest
import tomli_w
from torchtitan.config import JobConfig as UpstreamJobConfig

from torchtitan.experiments.tst.config.job_config import JobConfig
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.upstream_ranges import UPSTREAM_RANGES
from torchtitan.experiments.tst.config.values import (
    check_toml,
    check_values,
    kinds_of,
    range_of,
    type_of,
)
from torchtitan.experiments.tst.errors import ConfigError

KINDS_AND_RANGES = kinds_of(JobConfig)
KINDS = {key: type_of(kind) for key, kind in KINDS_AND_RANGES.items()}
VALUES = (7, 0.5, "7", True, ["a"], [1], {"a": 1})
NUMBERS = (-(2**70), -2, -1, -0.5, 0, 1, 1.5, 2**70, math.nan, math.inf)


def options_of(kind):
    return list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]


def nested(key, value):
    *sections, name = key.split(".")
    table = {name: value}
    for section in reversed(sections):
        table = {section: table}
    return table


def error_of(key, value):
    """The error of a TOML with one value; None without."""
    try:
        check_toml(JobConfig, nested(key, value))
    except ConfigError as error:
        message = str(error)
        assert message.startswith(f"{key} = {value!r}: must be ")
        assert "\n" not in message
        return message
    return None


@pytest.mark.parametrize("key", KINDS)
def test_wrong_types(key):
    kinds = options_of(KINDS[key])
    if get_origin(kinds[0]) is Literal:
        kinds = [*map(type, get_args(kinds[0])), *kinds[1:]]
    kinds += [int] * (float in kinds)
    of_list = {"['a']": {list[str]}, "[1]": {list[int], list[float]}}
    wrong = [v for v in VALUES if not ({type(v)} | of_list.get(str(v), set())) & set(kinds)]
    assert len(wrong) >= len(VALUES) - 3
    assert all(error_of(key, value) for value in wrong)


@pytest.mark.parametrize(
    "key", [key for key, kind in KINDS.items() if Literal in map(get_origin, options_of(kind))]
)
def test_wrong_choices(key):
    message = error_of(key, "no such choice")
    assert all(choice in message for choice in get_args(options_of(KINDS[key])[0]))
    assert error_of(key, "") and error_of(key, get_args(options_of(KINDS[key])[0])[0]) is None


@pytest.mark.parametrize(
    "key", [key for key, kind in KINDS.items() if {int, float} & set(options_of(kind))]
)
def test_numbers_out_of_range(key):
    """Each number has a range, and the default lies in it."""
    assert range_of(key, KINDS_AND_RANGES[key]), "what does upstream do with 0, -1, inf and nan?"
    kinds = options_of(KINDS[key])
    fitting = [n for n in NUMBERS if isinstance(n, int) or float in kinds]
    refused = [n for n in fitting if error_of(key, n)]
    assert refused and fitting != refused
    if float in kinds:
        assert math.isnan(next(n for n in refused if n != n))


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("training.steps", (1,), (0, -1)),
        ("training.local_batch_size", (1,), (0,)),
        ("training.global_batch_size", (-1, 1), (0, -2)),
        ("training.max_norm", (1, 0.5, math.inf), (0, -1.0)),
        ("training.gc_freq", (1,), (0,)),
        ("metrics.log_freq", (1,), (0,)),
        ("checkpoint.interval", (1,), (0,)),
        ("checkpoint.keep_latest_k", (0, 2), (1, -1)),
        ("checkpoint.exclude_from_loading", ([], ["optimizer"]), (["optimiser"], [""])),
        ("validation.freq", (1,), (0,)),
        ("validation.steps", (-1, 1), (0, -2)),
        ("optimizer.lr", (0, 3e-4), (-1e-3, math.inf)),
        ("optimizer.beta1", (0, 0.9), (1, 1.0, -0.1)),
        ("lr_scheduler.decay_ratio", (0, 1, 0.1), (1.1,)),
        ("activation_checkpoint.selective_ac_option", ("op", "2", "0"), ("", "two", "1.5", "-1")),
        ("compile.components", (["loss"], []), (["optimizer"],)),
        ("parallelism.context_parallel_load_balancer", ("headtail", "ptrr"), ("", "none")),
        ("parallelism.data_parallel_shard_degree", (-1, 1), (0, -2)),
        ("quantize.grouped_mm.float8.fqns", (["experts"], "experts"), (7,)),
        ("parallelism.module_fqns_per_model_part", ([["norm"]],), (["norm"], "norm", [[1]])),
        ("debug.seed", (0, -1, 2**64 - 1), (2**64,)),
        ("training.dataloader.num_workers", (0, 2), (-1,)),
    ],
)
def test_ranges_are_what_upstream_can_work_with(key, good, bad):
    assert [error_of(key, value) for value in good] == [None] * len(good)
    assert all(error_of(key, value) for value in bad)


def test_every_default_is_allowed():
    check_values(JobConfig())
    check_values(UpstreamJobConfig())


def test_no_range_is_of_a_key_that_there_is_not():
    assert set(UPSTREAM_RANGES) <= set(kinds_of(UpstreamJobConfig))


def test_values_of_the_command_line_are_checked_too():
    config = SuperpositionConfigManager().parse_args(["--checkpoint.interval=0"])
    with pytest.raises(ConfigError, match=r"^checkpoint\.interval = 0: must be"):
        check_values(config)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ({"training": 3}, r"training = 3: must be a section, \[training\]"),
        ({"training": {"dataloader": 3}}, r"must be a section, \[training\.dataloader\]"),
        ({"trainig": {}}, r"trainig = {}: unknown section; did you mean training\?"),
        ({"quantize": {"linear": {"fp8": {}}}}, r"quantize\.linear\.fp8 = {}: unknown"),
        ({"training": {"step": 3}}, r"training\.step = 3: unknown key; did you mean steps\?"),
        ({"seq_len": 3}, r"seq_len = 3: unknown key"),
    ],
)
def test_unknown_keys_and_sections(toml, message):
    with pytest.raises(ConfigError, match=message):
        check_toml(JobConfig, toml)


@dataclass
class Widget:
    size: int = 3
    shape: Literal["round", "square"] = "round"
    gadget: "Widget | None" = None  # a kind of the user's own


@dataclass
class ExtendedJobConfig:
    widget: Widget = field(default_factory=Widget)


@pytest.mark.parametrize(
    ("widget", "message"),
    [
        ({"size": "3"}, "widget.size = '3': must be an integer"),
        ({"shape": "oval"}, "widget.shape = 'oval': must be one of round, square"),
        ({"sizes": 3}, "widget.sizes = 3: unknown key; did you mean size?"),
    ],
)
def test_sections_of_a_custom_config_module(tmp_path, monkeypatch, widget, message):
    module = tmp_path / "job_of_mine.py"
    module.write_text("from test_values import ExtendedJobConfig as JobConfig\n")
    monkeypatch.syspath_prepend(tmp_path)
    job = tmp_path / "job.toml"

    def parse(widget):
        toml = {"job": {"custom_config_module": module.stem}, "widget": widget}
        job.write_text(tomli_w.dumps(toml))
        return SuperpositionConfigManager().parse_args([f"--job.config_file={job}"])

    assert parse({"size": 4}).widget.size == 4
    with pytest.raises(ConfigError) as error:
        parse(widget)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 1\n[job", r"is not TOML: .* \(at the end, line 2\)"),
        (b"[job\n", "is not TOML: .* line 1, column 5"),
        (b"a = 1\na = 2\n", "is not TOML: .* line 2"),
        (b"\xff\xfe[job]", "is not UTF-8"),
        (None, "No such file"),
    ],
)
def test_files_that_are_not_toml(tmp_path, content, message):
    path = tmp_path / "job.toml"
    if content:
        path.write_bytes(content)
    for argument in ("--job.config_file", "--job.config-file"):
        with pytest.raises(ConfigError, match=rf"^job\.config_file = '{path}': {message}") as error:
            SuperpositionConfigManager().parse_args([argument, str(path)])
        assert "\n" not in str(error.value)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 7\r\n")
    assert (
        SuperpositionConfigManager().parse_args([f"--job.config_file={path}"]).training.steps == 7
    )
