"""The pages show the examples as they are: scripts/include_examples.py fills their blocks."""

import re

import pytest

import include_examples
from documents import blocks
from jobs import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = sorted(
    path for path in (ROOT / "docs/examples").iterdir() if path.suffix in (".py", ".toml")
)
EXAMPLE = '''"""An example."""

import functools

SIZES: dict[str, int] = {
    "bag": 4,
}
a = b = 1


@functools.cache
@staticmethod
def first(x):
    """Return x."""
    return x


class Second:
    name = "second"

    def first(self):
        pass
'''
OBJECTS = {
    "SIZES": 'SIZES: dict[str, int] = {\n    "bag": 4,\n}\n',
    "b": "a = b = 1\n",
    "first": '@functools.cache\n@staticmethod\ndef first(x):\n    """Return x."""\n    return x\n',
    "Second": 'class Second:\n    name = "second"\n\n    def first(self):\n        pass\n',
}


def test_the_pages_are_what_the_script_writes(run_script):
    for path in PAGES:
        page = path.read_text()
        assert include_examples.filled(page) == page, path.name
    assert run_script("include_examples", "--check").code == 0


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_in_a_page(example):
    files = {block["file"] for path in PAGES for block in blocks_of(path.read_text())}
    assert str(example.relative_to(ROOT)) in files


def blocks_of(page):
    return include_examples.BLOCK.finditer(page)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_title_is_of_a_block_that_is_filled(path):
    page = path.read_text()
    assert len(re.findall(r"^ *```.*docs/examples", page, re.MULTILINE)) == len([*blocks_of(page)])


@pytest.fixture
def root(monkeypatch, tmp_path):
    """Return a folder with an example, instead of the repository."""
    path = tmp_path / "docs/examples/one.py"
    path.parent.mkdir(parents=True)
    path.write_text(EXAMPLE)
    monkeypatch.setattr(include_examples, "ROOT", tmp_path)
    return tmp_path


def block(title, code):
    return f'before\n\n```python title="{title}"\n{code}```\n\n```python\nother\n```\n'


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("old", ["", "old\n\nolder\n"])
def test_an_object(root, name, old):
    title = f"docs/examples/one.py: {name}"
    filled = include_examples.filled(block(title, old))
    assert filled == block(title, OBJECTS[name])
    assert blocks(filled, "python") == [OBJECTS[name], "other\n"]


def test_a_file(root):
    title = "docs/examples/one.py"
    assert include_examples.filled(block(title, "")) == block(title, EXAMPLE)


def test_a_block_in_a_list(root):
    page = '1. first\n\n    ```python title="docs/examples/one.py: b"\n    ```\n'
    assert include_examples.filled(page) == page[:-8] + "    a = b = 1\n    ```\n"


@pytest.mark.parametrize(
    ("title", "error"),
    [
        ("docs/examples/one.py: name", r"one\.py defines no name$"),
        ("docs/examples/one.py: functools", r"one\.py defines no functools$"),
        ("docs/examples/two.py: first", r"there is no file .*two\.py$"),
    ],
)
def test_what_does_not_exist(root, title, error):
    with pytest.raises(ValueError, match=error):
        include_examples.filled(block(title, ""))


def test_the_script_fills_pages_or_names_those_that_differ(root, run_script):
    title = "docs/examples/one.py: first"
    page = root / "docs/page.md"
    page.write_text(block(title, "old\n"))
    (root / "docs/other.md").write_text("other\n")
    result = run_script("include_examples", "--check")
    assert result.code == 1 and result.stderr.startswith("page.md differ from the examples: run")
    assert page.read_text() == block(title, "old\n")
    assert run_script("include_examples").code == 0
    assert page.read_text() == block(title, OBJECTS["first"])
    assert run_script("include_examples", "--check").code == 0
    page.write_text(block("docs/examples/two.py", ""))
    result = run_script("include_examples")
    assert result.code == 1 and result.stderr.startswith("page.md: there is no file ")
