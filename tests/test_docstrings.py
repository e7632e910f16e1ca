"""References in docstrings, such as ``:mod:`.inventory```, lead to what is there."""

import importlib
import re

import pytest

from jobs import ROOT

FOLDER = ROOT / "torchtitan/experiments"
REFERENCE = re.compile(r":(?:mod|func|class|meth|data):`(\.[\w.]+)`")
MODULES = [
    path for path in sorted((FOLDER / "tst").rglob("*.py")) if REFERENCE.search(path.read_text())
]


def resolve(name: str) -> None:
    module, rest = name, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest = [last, *rest]
    for part in rest:
        found = getattr(found, part)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(FOLDER / "tst")))
def test_references_lead_somewhere(path):
    package = ["torchtitan", "experiments", *path.relative_to(FOLDER).parent.parts]
    for reference in REFERENCE.findall(path.read_text()):
        name = reference.lstrip(".")
        dots = len(reference) - len(name)
        resolve(".".join([*package[: len(package) - dots + 1], name]))


def test_a_reference_to_nothing_is_noticed():
    with pytest.raises(AttributeError):
        resolve("torchtitan.experiments.tst.core.bags.no_such")
