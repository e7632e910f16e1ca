"""Which tests see a GPU."""

import pytest

from selection import selects_gpu_tests


@pytest.mark.parametrize(
    ("arguments", "selects"),
    [
        ([], False),
        (["tests/test_gpu.py", "-k", "gpu"], False),
        (["-m", "slow"], False),
        (["-m", "not slow and not gpu"], False),
        (["-m", "gpu"], True),
        (["-m", "gpu and not slow"], True),
        (["-v", "-m", "slow or gpu", "tests"], True),
        (["-m", "slow and gpu"], True),
    ],
)
def test_a_gpu_is_hidden_unless_tests_that_need_one_are_asked_for(arguments, selects):
    assert selects_gpu_tests(arguments) is selects
