"""What TorchTitan 0.3 does not know of 0.2.2 is written from 0.2.2 and is current."""

import json

import pytest

import write_titan03_tables as tables
from torchtitan.experiments.tst.models.flavors import LLAMA3, QWEN3


@pytest.mark.parametrize("name", ["keys", "numbers"])
def test_a_file_is_current(name):
    path = tables.NUMBERS if name == "numbers" else tables.FOLDER / "keys.json"
    assert json.loads(path.read_text()) == getattr(tables, name)()


def test_flavors_are_current():
    """Other tests register flavors of their own."""
    found = tables.flavors()
    for model, written in json.loads((tables.FOLDER / "flavors.json").read_text()).items():
        assert set({"llama3": LLAMA3, "qwen3": QWEN3}[model]) <= set(written)
        assert {flavor: found[model][flavor] for flavor in written} == written
