"""``--engine`` says which TorchTitan a user expects."""

import pytest

from jobs import ROOT

JOB = ROOT / "train_configs/debug/llama3.toml"


@pytest.mark.parametrize("command", ["check", "train"])
def test_another_engine_than_the_installed_one(tst, command):
    result = tst(command, JOB, "--engine=0.3")
    assert result.code == 2
    assert result.stderr == (
        "error: --engine 0.3: TorchTitan 0.2.2 is installed; use an environment with "
        "torchtitan==0.3.0, or remove this option\n"
    )


def test_the_installed_engine(tst):
    assert tst("check", JOB, "--engine=0.2", "--ranks=1", "--no-files").code == 0
