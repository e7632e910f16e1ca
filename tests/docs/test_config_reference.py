"""docs/config.md has what the code has, and its statements on keys of TorchTitan are true."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tomli
import tomli_w

import write_config_reference as reference
from documents import blocks, page, table
from jobs import small_job, validation
from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.config.allowed import at_least
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.config.sections import Unit
from torchtitan.experiments.tst.data.text.datasets import OURS
from torchtitan.experiments.tst.errors import ConfigError

PAGE = page("docs/config.md")


def test_the_page_has_what_the_code_has(run_script):
    assert reference.updated(PAGE, reference.sections()) == PAGE
    assert run_script("write_config_reference", "--check").code == 0


@dataclass
class Gadget:
    size: Annotated[int | list[int] | None, at_least(1), Unit("tokens")] = None
    """
    The size, as of training.steps and of `training.seq_len`.
    It may be a list:
    - `first`: a|b,
      on two lines.
    - `second`.
    The end.
    """

    shape: Literal["round", "square"] = "round"
    """The shape."""

    is_new: bool = True
    """Whether it is new."""

    names: list[str] = field(default_factory=lambda: ["a", "b"])
    """Its names."""


TABLE = r"""
| key | type | default | allowed | unit | meaning |
| --- | --- | --- | --- | --- | --- |
| `size` | integer or list of integers or `None` | `None` | an integer of at least 1 | tokens | The size, as of `training.steps` and of `training.seq_len`. It may be a list:<br>- `first`: a\|b, on two lines.<br>- `second`.<br>The end. |
| `shape` | string | `"round"` | `"round"`, `"square"` |  | The shape. |
| `is_new` | boolean | `true` | `true`, `false` |  | Whether it is new. |
| `names` | list of strings | `["a", "b"]` | any |  | Its names. |
"""  # noqa: E501
PLACE = "before\n<!-- keys of [gadget] -->\n{}<!-- end of keys -->\nafter\n"


def test_a_table():
    found = reference.updated(PLACE.format("old\n"), {"gadget": Gadget})
    assert found == PLACE.format(f"{TABLE}\n")
    assert reference.updated(found, {"gadget": Gadget}) == found


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        ("", {"gadget": Gadget}, r"no place for the keys of \[gadget\]"),
        ("<!-- keys of [gadget] -->\n", {"gadget": Gadget}, r"no place for the keys of \[gadget\]"),
        (PLACE.format(""), {}, "there are no sections gadget"),
    ],
)
def test_a_section_without_its_place(text, classes, message):
    with pytest.raises(ValueError, match=message):
        reference.updated(text, classes)


@dataclass
class Untold:
    size: int = 1
    shape: str = "round"
    """The shape."""


def test_a_key_without_a_text():
    with pytest.raises(ValueError, match=r"^Untold\.size: no text below it"):
        reference.table("untold", Untold)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (
            "| `1` | an integer of at least 1 (1",
            "| `2` | an integer of at least 1 (1",
            "superposition",
        ),
        ("a finite number above 0", "a number above 0", "load_balance"),
        ("Launch it again without this key", "Launch it again", "superposition"),
        ("| `text_key` |", "| `text_keys` |", "text_dataset"),
        ('`"repeat"`, `"stop"`', '`"repeat"`', "token_shards"),
    ],
)
def test_a_difference_is_noticed(run_script, tmp_path, monkeypatch, old, new, named):
    assert PAGE.count(old) == 1
    changed = tmp_path / "config.md"
    changed.write_text(PAGE.replace(old, new))
    monkeypatch.setattr(reference, "PAGE", changed)
    result = run_script("write_config_reference", "--check")
    assert result.code == 1 and f"differs from the code in {named}: run" in result.stderr
    assert run_script("write_config_reference").code == 0
    assert changed.read_text() == PAGE


def config_of(toml, tmp_path, *args):
    path = tmp_path / "job.toml"
    path.write_text(toml)
    return SuperpositionConfigManager().parse_args([f"--job.config_file={path}", *args])


def test_the_minimal_job(corpus, tokens, tmp_path):
    (toml,) = blocks(PAGE, "toml")
    config = config_of(toml, tmp_path)
    assert build_schedule(config).boundary == 30
    config.model.hf_assets_path = str(corpus / "tokenizer")
    config.training.dataset_path = str(tokens)
    config.job.dump_folder = str(tmp_path)
    check_job(config, 2)


def rows(header):
    return [re.findall(r"`([^`]+)`", line) for line in table(PAGE, header).splitlines()]


def test_values_in_the_toml_and_on_the_command_line(tmp_path):
    forms = rows("value")
    assert len(forms) == 8
    for *of_toml, line in forms:
        alone, same = line.split(), None
        if of_toml != ["None"]:
            toml, *other = of_toml
            same = config_of(toml, tmp_path)
            assert all(SuperpositionConfigManager().parse_args([*o.split()]) for o in other)
        found = SuperpositionConfigManager().parse_args(alone)
        if same is None:
            same = SuperpositionConfigManager().parse_args([])
        same.job.config_file = None
        assert found == same, line


def test_the_datasets_of_this_package():
    (row,) = [row for row in rows("key") if row[:1] == ["training.dataset"]]
    assert {*OURS} == {*row} - {"training.dataset", "token_shards"}


def merged(base, more):
    for key, value in more.items():
        if isinstance(value, dict):
            value = merged(base.get(key, {}), value)
        base = base | {key: value}
    return base


@pytest.mark.parametrize("row", table(PAGE, "refused").splitlines())
def test_values_that_are_refused(row, corpus, tmp_path):
    values = re.findall(r"`([^`]+ = [^`]+)`", row.split("|")[1])
    job = tomli.loads("\n".join(values))
    if "in superposition" in row:
        job = merged(job, {"superposition": {"bag_size": 4, "steps": 2}})
    job = merged({"checkpoint": {"enable": True}}, job)
    set_here = {key.partition(" ")[0] for key in values}
    base = [*small_job(corpus), *validation(corpus)]
    base = [argument for argument in base if argument[2:].partition("=")[0] not in set_here]
    config = config_of(tomli_w.dumps(job), tmp_path, *base, f"--job.dump_folder={tmp_path}")
    with pytest.raises(ConfigError) as error:
        check_job(config, 2)
    key = values[0].partition(" ")[0]
    assert str(error.value).startswith(f"{key} = ")
