"""The suite accepts a right implementation, and says of each wrong one what is wrong."""

import sys

import pytest
from implementations import Right, SeparateWindows, Tied, TwoOptimizers, V, WeightsNormalized
from wrong_implementations import WRONG, SumOfBag, TailsCounted

import documents
from torchtitan.experiments.tst.core.conformance import check, load, summary
from torchtitan.experiments.tst.core.conformance.run import main


def problems(implementation):
    """Return what is wrong, by the titles of the checks that fail."""
    return {r.title: r.problem for r in check(implementation) if r.problem}


@pytest.mark.parametrize("right", [Tied, WeightsNormalized, TwoOptimizers, SeparateWindows])
def test_other_right_implementations_pass(right):
    assert not problems(right)


def test_a_right_implementation_passes():
    shown = []
    results = check(Right, shown.append)
    assert shown == results and not problems(Right)
    assert summary(results) == "18 of 18 checks pass."
    assert str(results[0]) == "ok    Input bags have every token, in order"


@pytest.mark.parametrize(("wrong", "title", "sentence"), WRONG)
def test_a_wrong_implementation_is_told_what_is_wrong(wrong, title, sentence):
    assert sentence in problems(wrong)[title]


def test_every_check_finds_something():
    assert {result.title for result in check(Right)} == {title for _, title, _ in WRONG}


def test_a_problem_is_reported_below_its_title():
    text = str(next(result for result in check(SumOfBag) if result.problem))
    assert text == (
        "FAIL  The embedding of a bag is the mean, summed in float32\n"
        "      The embedding of a bag is the sum of its tokens'. Divide it by s."
    )


def test_an_exception_is_a_problem_of_its_check_only():
    class Fails(Right):
        def embed(self, inputs):
            raise RuntimeError("no embedding")

    assert list(problems(Fails)) == ["The embedding of a bag is the mean, summed in float32"]
    assert "RuntimeError: no embedding (test_conformance.py, line" in "".join(
        problems(Fails).values()
    )


def test_a_training_that_cannot_be_compared_is_a_problem():
    class Silent(Right):
        def train(self, tokens, bag_sizes, after_step):
            super().train(tokens, bag_sizes, lambda *step: None)

    class ByHand(Right):
        def update(self, loss, optimizer, scheduler):
            loss.backward()

    assert "calls after_step 0 times" in " ".join(problems(Silent).values())
    unseen = "No optimizer of torch.optim steps before after_step"
    assert unseen in " ".join(problems(ByHand).values())


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"sequences": 1}, "sequences = 1 must be 2 or more"),
        ({"bag_size": 1}, "bag_size = 1 must be 2 or more"),
        ({"weightings": ("linear",)}, r"weightings = \['linear'\] must be some of uniform"),
    ],
)
def test_what_cannot_be_checked_is_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        check(type("Refused", (Right,), attributes))


def test_an_implementation_is_loaded_from_a_file(tmp_path):
    methods = ["fold", "embed", "logits", "loss", "validate", "train"]
    body = "\n".join(f"    def {name}(self): ..." for name in methods)
    path = tmp_path / "mine.py"
    for text, message in (
        ("", "mine.py defines no class TST"),
        (
            f"class TST:\n{body}",
            "lacks train_ordinary; class Implementation",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(path)
    with pytest.raises(ValueError, match="is not a Python file"):
        load(tmp_path / "none.py")
    (tmp_path / "beside.py").write_text("from implementations import Right")
    path.write_text("from beside import Right\nclass TST(Right): pass")
    assert load(path).vocab_size == V


def test_a_copy_is_run_as_a_module(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.py"
    path.write_text("from wrong_implementations import SumOfBag\nclass TST(SumOfBag): pass")
    for arguments, code, text in (
        ([path], 1, "17 of 18 checks pass."),
        ([], 2, "usage: python -m PACKAGE.conformance FILE"),
        ([tmp_path], 2, "is not a Python file"),
    ):
        monkeypatch.setattr(sys, "argv", ["conformance", *map(str, arguments)])
        assert main() == code
        assert text in "".join(capsys.readouterr())


def test_the_report_in_the_docs_is_true():
    results = check(TailsCounted)
    (report,) = documents.blocks(documents.page("docs/own-loop.md"), "text")
    *first, summarized = report.replace("...\n", "").splitlines()
    assert first == "\n".join(map(str, results[:3])).splitlines()
    assert summarized == summary(results)
