"""``tst configs``: the TOMLs that come with the package."""

import pytest

from jobs import ROOT
from torchtitan.experiments.tst import shipped

FOLDER = ROOT / "train_configs"
SHIPPED = sorted(
    path for name in ("demo", "debug", "paper") for path in (FOLDER / name).rglob("*.toml")
)


def test_list_has_each_with_its_purpose(tst):
    result = tst("configs", "list")
    lines = result.stdout.splitlines()
    assert result.code == 0 and len(lines) == len(SHIPPED) > 25
    purposes = dict(line.split(maxsplit=1) for line in lines)
    for path in SHIPPED:
        purpose = purposes[str(path.relative_to(ROOT))]
        comment = path.read_text().partition("\n\n")[0].replace("\n# ", " ")
        assert comment.startswith(f"# {purpose}") and len(purpose) > 10


def test_copy_gives_the_same_files_once_and_again(tst, tmp_path):
    for _ in range(2):
        result = tst("configs", "copy", tmp_path)
        assert result.code == 0, result.stderr
        assert result.stdout == f"{len(SHIPPED)} configs are in {tmp_path / 'train_configs'}\n"
    copies = sorted((tmp_path / "train_configs").rglob("*.toml"))
    assert [path.relative_to(tmp_path) for path in copies] == sorted(
        path.relative_to(ROOT) for path in SHIPPED
    )
    for path in copies:
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes()


def test_copy_overwrites_nothing(tst, tmp_path):
    mine = tmp_path / "train_configs/paper/3B-20k-tst.toml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# mine\n")
    result = tst("configs", "copy", tmp_path)
    assert result.code == 2
    error = f"{mine} exists already and differs from the package's; give another folder"
    assert result.stderr == f"error: {error}\n"
    assert mine.read_text() == "# mine\n"
    assert list(tmp_path.rglob("*.toml")) == [mine]


def test_a_copy_of_the_package_without_them_says_so(tst, monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "torchtitan/experiments/tst")
    result = tst("configs", "list")
    assert result.code == 2 and "has no job configs" in result.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_they_are_found_in_the_package_and_beside_it(monkeypatch, tmp_path, installed):
    package = tmp_path / "torchtitan/experiments/tst"
    folder = (package if installed else tmp_path) / "train_configs/demo"
    folder.mkdir(parents=True)
    (folder / "a.toml").write_text("# A job. More of it.\n\n[job]\n")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    ((path, purpose),) = shipped.shipped_configs()
    assert (str(path), purpose) == ("demo/a.toml", "A job")
