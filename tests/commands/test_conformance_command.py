"""``tst conformance``: the suite on a file of the user's."""

import re

import pytest

from jobs import ROOT

FILE = f"""
import sys

sys.path.insert(0, "{ROOT / "tests/core"}")
from wrong_implementations import {{0}}


class TST({{0}}):
    {{1}}
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.py"


def test_a_right_implementation(tst, file):
    file.write_text(FILE.format("Right", "pass"))
    result = tst("conformance", file)
    assert result.code == 0, result.stderr
    *checks, last = result.stdout.splitlines()
    assert all(line.startswith("ok    ") for line in checks) and len(checks) > 10
    assert last == f"{len(checks)} of {len(checks)} checks pass."


def test_a_wrong_implementation(tst, file):
    file.write_text(FILE.format("SumOfBag", "pass"))
    result = tst("conformance", file)
    assert result.code == 1 and not result.stderr
    (problem,) = re.findall(r"^FAIL  .*\n      (.*)$", result.stdout, re.MULTILINE)
    assert problem == "The embedding of a bag is the sum of its tokens'. Divide it by s."


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "{} is not a Python file; give the file that defines the class TST"),
        ("", "{} defines no class TST; .*"),
        ("class TST:\n    vocab_size = 32", "TST of {} lacks .*fold.*"),
        ("import no_such_module", "{}.*: ModuleNotFoundError: No module named 'no_such_module'.*"),
        ("import lm_eval.no_such_module", "{}.*: ModuleNotFoundError: .*"),
        ("class TST", "{}.*: SyntaxError: .*"),
        (FILE.format("Right", "bag_size = 1"), "{}: bag_size = 1 must be 2 or more"),
        (
            FILE.format("Right", "def __init__(self): raise OSError('no\\nweights')"),
            "{}.*: OSError: no weights.*",
        ),
        (
            FILE.format("Right", "def __init__(self): raise ValueError('no\\nweights')"),
            "{}: ValueError: no weights",
        ),
    ],
)
def test_an_error_of_the_user_is_one_line_and_names_the_file(tst, file, text, error):
    if text is not None:
        file.write_text(text)
    result = tst("conformance", file)
    assert result.code == 2 and not result.stdout
    assert re.fullmatch(f"error: {error.format(re.escape(str(file)))}\n", result.stderr)
