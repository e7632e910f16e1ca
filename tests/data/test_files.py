"""Which files are read, and which are skipped and why."""

import os
import shutil

import fsspec
import pytest

from torchtitan.experiments.tst.data.errors import DataError
from torchtitan.experiments.tst.data.text.files import JSONL, data_files

FILES = [
    "a.jsonl",
    "b/2.jsonl.zst",
    "b/c/3.json.gz",
    "[c].json.gz",
    "_a.jsonl",
    "b.json",
    "README",
    "t.parquet",
    ".ipynb_checkpoints/a-checkpoint.jsonl",
    ".b.jsonl",
    "_temporary/0/d.jsonl",
    "b/.e/f.jsonl",
]
READ = ["[c].json.gz", "_a.jsonl", "a.jsonl", "b/2.jsonl.zst", "b/c/3.json.gz"]
OTHER = {"b.json", "README", "t.parquet"}


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "0.jsonl").touch()
    return tmp_path


def below(folder, files):
    return [file.partition(f"{folder}/")[2] for file in files]


def test_a_folder(folder):
    files = data_files(str(folder), JSONL)
    assert below(folder, files.read) == READ
    assert {reason: set(names) for reason, names in files.skipped.items()} == {
        "hidden": {".ipynb_checkpoints/", ".b.jsonl", "_temporary/", "b/.e/"},
        "of 0 bytes": {"0.jsonl"},
        "of another kind": OTHER,
    }
    assert str(files) == "5 files (2 .json.gz, 2 .jsonl, 1 .jsonl.zst)"
    assert files.warning() == (
        "8 skipped: 4 hidden (.b.jsonl, .ipynb_checkpoints/, _temporary/, ...); "
        "1 of 0 bytes (0.jsonl); 3 of another kind (README, b.json, t.parquet)"
    )


def test_links_are_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "e.jsonl").write_text("x")
    (folder / "0-link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "b-link").symlink_to(folder / "b")
    (folder / "e.jsonl").symlink_to(elsewhere / "e.jsonl")
    (folder / "nowhere.jsonl").symlink_to(elsewhere / "none")
    files = data_files(str(folder), JSONL).read
    assert below(folder, files) == sorted([*READ, "0-link/e.jsonl", "e.jsonl", "nowhere.jsonl"])


@pytest.mark.parametrize(
    "pattern, read",
    [
        ("*/*.jsonl*", ["b/2.jsonl.zst"]),
        ("b*", ["b.json"]),  # no other kind, and a folder
        ("[ab].json*", ["a.jsonl"]),
        ("**", READ),
        (".ipynb*/*", [".ipynb_checkpoints/a-checkpoint.jsonl"]),
        ("[c].json.gz", ["[c].json.gz"]),
        ("README", ["README"]),
    ],
)
@pytest.mark.parametrize("by_url", [False, True])
def test_a_pattern(folder, pattern, read, by_url):
    path = f"{folder}/{pattern}"
    assert below(folder, data_files(f"file://{path}" if by_url else path, JSONL).read) == read


def test_folders_that_a_pattern_matches_are_named(folder):
    files = data_files(f"{folder}/b*", (".json",))
    assert below(folder, files.read) == ["b.json"]
    assert "1 folders that the pattern matches" in files.warning()
    assert "b/" in files.warning()
    assert not data_files(f"{folder}/**", JSONL).skipped.get("folders that the pattern matches")


def test_a_pattern_reads_a_file_once_where_links_lead_back(folder):
    (folder / "b" / "loop").symlink_to(folder)
    files = data_files(f"{folder}/**/*.jsonl*", JSONL).read
    assert below(folder, files) == ["_a.jsonl", "a.jsonl", "b/2.jsonl.zst"]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(folder, monkeypatch):
    def deny(path):
        if str(path).endswith("/c"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match=f"{folder}/b/c cannot be listed: Permission denied"):
        data_files(str(folder), JSONL)


def test_an_empty_path_is_not_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match="give a file, a folder, a pattern or a URL"):
        data_files("", JSONL)


def test_the_checksum_is_of_names_and_sizes(folder, tmp_path_factory):
    def checksum(path):
        return data_files(str(path), JSONL).checksum()

    before = checksum(folder)
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "corpus")
    assert checksum(moved) == before
    (moved / "a.jsonl").write_text("xx")
    assert checksum(moved) != before
    (folder / "a.jsonl").rename(folder / "z.jsonl")
    assert checksum(folder) != before


def test_a_folder_whose_name_is_a_pattern(folder):
    (folder / "b").rename(folder / "b [v1]")
    assert below(folder, data_files(f"{folder}/b [v1]", JSONL).read) == [
        "b [v1]/2.jsonl.zst",
        "b [v1]/c/3.json.gz",
    ]


@pytest.mark.parametrize(
    "path, said",
    [
        ("none", "no such file or folder"),
        ("none*", "the pattern matches nothing"),
        ("b/[c]", "the pattern matches only folders"),
        ("0*", r"the pattern has no file to read .*1 of 0 bytes \(.*0\.jsonl\)"),
        ("_temporary", r"the folder has no file to read \(\.jsonl, .*: 1 skipped: 1 hidden"),
    ],
)
def test_nothing_to_read(folder, path, said):
    (folder / "_temporary" / "0").rename(folder / "_temporary" / ".0")
    with pytest.raises(DataError, match=said):
        data_files(f"{folder}/{path}", JSONL)


def test_urls(folder):
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/corpus/", recursive=True)
    try:
        files = data_files("memory://corpus", JSONL)
        assert below("corpus", files.read) == READ
        assert files.read[0] == "memory:///corpus/[c].json.gz"
        assert set(files.skipped["of another kind"]) == OTHER
        assert data_files("memory://corpus/README", JSONL).read == ["memory://corpus/README"]
        assert below("corpus", data_files("memory://corpus/**", JSONL).read) == READ
        assert below("corpus", data_files("memory://corpus/[ab].json*", JSONL).read) == ["a.jsonl"]
        for path in ("none", "none*"):
            with pytest.raises(DataError, match=r"no such file or folder|matches nothing"):
                data_files(f"memory://corpus/{path}", JSONL)
        with pytest.raises(DataError, match="cannot be listed: ValueError: Protocol not known"):
            data_files("nothing://corpus", JSONL)
    finally:
        memory.rm("/corpus", recursive=True)
