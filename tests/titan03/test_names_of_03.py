"""The table of ``upstream/README.md`` for TorchTitan 0.3: every name in it exists."""

import pytest

from private_names import of_engine, resolve


@pytest.mark.parametrize("name", of_engine("0.3"))
def test_a_name_in_the_table_exists(name):
    resolve(name)
