"""``tst diff`` as a user runs it."""

import pytest

PAPER = "train_configs/paper"


def test_diff(tst):
    jobs = [f"{PAPER}/270M-20k-baseline.toml", f"{PAPER}/270M-20k-tst.toml"]
    result = tst("diff", *jobs)
    assert result.code == 0, result.stderr
    assert "- superposition.bag_size = 1\n+ superposition.bag_size = 6\n" in result.stdout
    assert "optimizer" not in result.stdout and "all of them allowed" in result.stdout
    result = tst("diff", jobs[0], "--optimizer.lr=1e-3", "--", jobs[1])
    assert result.code == 1
    assert "- optimizer.lr = 0.001   <- not allowed to differ" in result.stdout
    assert "1 of 5 differences" in result.stderr
    result = tst("diff", "--allow", "optimizer.lr", jobs[0], "--optimizer.lr=1", "--", jobs[0])
    assert result.code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["one.toml"], "give two TOML files"),
        (["no.toml", "none.toml"], "job.config_file = 'no.toml': No such file or directory"),
        (["--", "none.toml"], "each job must begin with its TOML file"),
    ],
)
def test_diff_of_bad_input(tst, args, message):
    result = tst("diff", *args)
    assert result.code == 2
    assert message in result.stderr
