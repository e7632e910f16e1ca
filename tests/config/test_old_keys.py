"""Keys of older versions of TorchTitan are named with their new place."""

import pytest
from torchtitan.config import JobConfig as UpstreamJobConfig

from jobs import ROOT
from torchtitan.experiments.tst.config.job_config import JobConfig
from torchtitan.experiments.tst.config.old_keys import OLD_KEYS
from torchtitan.experiments.tst.config.values import check_toml, kinds_of
from torchtitan.experiments.tst.errors import ConfigError

KINDS = kinds_of(UpstreamJobConfig)
DEPRECATED = {"model.tokenizer_path", "experimental.custom_args_module"}  # but there


def test_new_places_are_there_and_old_ones_are_not():
    assert {place.key for place in OLD_KEYS.values()} - {""} <= set(KINDS)
    assert set(OLD_KEYS) & set(KINDS) == DEPRECATED
    assert all(place.key or place.note for place in OLD_KEYS.values())


@pytest.mark.parametrize("key", sorted(set(OLD_KEYS) - DEPRECATED))
def test_each_is_recognized(key):
    section, name = key.split(".")
    with pytest.raises(ConfigError) as error:
        check_toml(JobConfig, {section: {name: 1}})
    assert str(error.value).startswith(f"{key} = 1 ({OLD_KEYS[key]}): a key of an older")


def test_all_of_a_file_are_named_at_once():
    old = {
        "model": {"tokenizer_path": "tokenizer.model"},
        "training": {"batch_size": 1, "steps": "wrong too"},
        "float8": {"filter_fqns": "output"},
    }
    with pytest.raises(ConfigError) as error:
        check_toml(JobConfig, old)
    message = str(error.value)
    assert "training.batch_size = 1 (now training.local_batch_size)" in message
    assert "float8.filter_fqns = 'output' (now quantize.linear.float8.filter_fqns" in message
    assert "model.tokenizer_path = 'tokenizer.model' (now model.hf_assets_path" in message
    assert "\n" not in message


def test_a_deprecated_key_alone_is_upstreams():
    check_toml(JobConfig, {"model": {"tokenizer_path": "assets"}})


def test_the_table_of_the_docs():
    text = (ROOT / "docs" / "old-keys.md").read_text()
    rows = [
        f"| `{key}` | {f'`{place.key}`' if place.key else 'gone'} | {place.note} |"
        for key, place in OLD_KEYS.items()
    ]
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows
