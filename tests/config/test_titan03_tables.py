"""What TorchTitan 0.3 does not know of 0.2.2 is written from 0.2.2 and is current."""

import json
import os
import subprocess
import sys

import pytest

import write_titan03_tables as tables
from jobs import ROOT


@pytest.mark.parametrize("name", ["keys", "numbers"])
def test_a_file_is_current(name):
    path = tables.NUMBERS if name == "numbers" else tables.FOLDER / "keys.json"
    assert json.loads(path.read_text()) == getattr(tables, name)()


def test_flavors_are_current():
    """In a process of its own, because other tests register flavors and change their lengths."""
    code = "import json, write_titan03_tables as tables; print(json.dumps(tables.flavors()))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    written = (tables.FOLDER / "flavors.json").read_text()
    assert json.loads(run.stdout.splitlines()[-1]) == json.loads(written)
