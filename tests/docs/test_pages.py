"""The documents are true: their links, paths, commands and keys exist."""

import re
import shlex
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from itertools import chain

import pytest
from torchtitan.hf_datasets.text_datasets import DATASETS

import documents
from documents import NAMES, PACKAGE, PAGES
from jobs import ROOT
from torchtitan.experiments.tst.commands import COMMANDS, running
from torchtitan.experiments.tst.config.job_config import JobConfig
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager

JOB_SH = (ROOT / "scripts" / "job.sh").read_text()
of_each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES.get)


@of_each_page
def test_links_lead_somewhere(page):
    assert not documents.broken_links(page, page.read_text())


@of_each_page
def test_paths_exist(page):
    for name in documents.paths(page.read_text()):
        if not name.startswith("docs/site"):  # built, not committed
            assert (ROOT / name).exists(), name


@of_each_page
def test_modules_named_from_a_folder_exist(page):
    """A module may be named from the folder above its own: `core/losses.py`."""
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text()):
        folders = (ROOT, PACKAGE, page.parent, *(p for p in PACKAGE.rglob("*") if p.is_dir()))
        assert any((folder / name).exists() for folder in folders), name


SUFFIXES = {"toml", "json", "jsonl", "py"}  # `metrics.jsonl` is a file
OLD_KEYS = ROOT / "docs/old-keys.md"  # its first column has keys that are none
# Keys that only TorchTitan 0.3 has; tests/titan03/test_trainer_of_03.py checks them.
KEYS_OF_03 = {
    ("parallelism", "spmd_backend"),
    ("debug", "spmd_typechecking"),
    ("training", "disable_cuda_graphs"),
}


def unknown_keys(text: str) -> list[str]:
    """Return what is named like a key of a section and is none."""
    job, unknown = JobConfig(), []
    known = {("section", "key"), ("job", "config"), *KEYS_OF_03}
    for section, key in documents.keys(text) - known:
        of_section = getattr(job, section, None)
        if not is_dataclass(of_section):
            unknown += [f"--{section}.{key}"] * (f"--{section}." in text)
        elif key not in {*SUFFIXES, *(f.name for f in fields(of_section))}:
            unknown.append(f"{section}.{key}")
    return unknown


SOURCES = [
    ROOT / "run_train.sh",
    *sorted((ROOT / "scripts").rglob("*.py")),
    *sorted((ROOT / "docs/examples").glob("*.py")),
    *sorted((PACKAGE / "commands").glob("*.py")),
    *sorted(path for path in (ROOT / "scripts/slurm").iterdir() if path.is_file()),
]


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_exist(path):
    if path != OLD_KEYS:
        assert not unknown_keys(path.read_text())


def test_what_does_not_exist_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n[one](#a-page) [two](#no) [three](other.md) [four](page.md#a-page)\n"
        "`training.steps` `training.step` `--superposition.size 3` `scripts/no.py`\n"
    )
    text = page.read_text()
    assert documents.broken_links(page, text) == ["#no", "other.md"]
    assert {*unknown_keys(text)} == {"training.step", "superposition.size"}
    assert documents.paths(text) == {"scripts/no.py"}


def test_commands_are_understood(monkeypatch):
    """Each line of ``tst`` in a document is parsed, as far as its command would be called."""
    understood: list[str] = []
    names = list(chain(*COMMANDS.values()))

    def recorded(name: str, main: Callable[..., None]) -> Callable[..., None]:
        return wraps(main)(lambda *args, **options: understood.append(name))  # read by tyro

    for name in names:
        module = running._module(name)
        monkeypatch.setattr(module, "main", recorded(name, module.main))
    expected = []
    for page in PAGES:
        text = page.read_text()
        assert {*re.findall(r"`tst ([a-z-]+)[ `]", text)} <= {*names}, NAMES[page]
        for line in documents.commands(text):
            tst, *words = shlex.split(line)
            if tst != "tst" or {"COMMAND", "..."} & {*words} or all(map(str.isalpha, words)):
                continue  # not tst's, or only the name of a command, or of any
            running.run(words[0], words[1:])
            expected.append(words[0])
    assert understood == expected
    assert {*expected} == {*names}


def test_the_table_has_every_command():
    rows = documents.table(documents.page("docs/running.md"), "command")
    assert re.findall(r"^\| `([a-z-]+)`", rows, re.MULTILINE) == list(chain(*COMMANDS.values()))


def test_every_page_is_linked_from_the_readme():
    readme = documents.page("README.md")
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {"docs/old-keys.md"}
    assert pages <= {*documents.links(readme)}


def test_variables_of_the_batch_scripts_are_documented():
    documented = {
        *re.findall(r"`([A-Z_]+)`", documents.table(documents.page("docs/slurm.md"), "variable"))
    }
    scripts = [(ROOT / "scripts/slurm" / name).read_text() for name in ("train.sbatch", "chain.sh")]
    named = set(re.findall(r"^#   ([A-Z_]+) {2,}", "\n".join(scripts), re.MULTILINE))
    named -= {"NCCL_IB_HCA"}  # NCCL's own
    assert named == documented
    for name in documented:
        assert re.search(rf"\$\{{?{name}\b", "\n".join([*scripts, JOB_SH])), name


def test_the_page_of_data(tst):
    text = documents.page("docs/data.md")
    rows = documents.table(text, "`training.dataset`")
    names = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows.splitlines()))
    assert {*names, "c4_test"} == set(DATASETS)
    result = tst("tokenize", "--help")
    assert result.code == 0
    for option in re.findall(r"--[\w-]+", text.partition("## Train")[0]):
        assert option in result.stdout


def test_toml_is_a_config(tmp_path):
    """Each TOML of a page is a part of a job, and is taken as such."""
    job = tmp_path / "job.toml"
    for page in PAGES:
        for toml in documents.blocks(page.read_text(), "toml"):
            job.write_text(toml)
            SuperpositionConfigManager().parse_args([f"--job.config_file={job}"])
