"""The diagrams of the docs are what the script draws, and their texts have room."""

import re
import xml.etree.ElementTree as ET
from itertools import combinations
from typing import NamedTuple

import pytest
import tomli

import draw_figures
from jobs import ROOT

SVG = "{http://www.w3.org/2000/svg}"
ADVANCE = 0.6  # of a letter in a wide sans-serif font, in parts of the font size


class Area(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float
    what: str = ""

    def overlaps(self, other: "Area") -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: "Area") -> bool:
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


def texts(figure: ET.Element) -> list[Area]:
    found = []
    for text in figure.iter(f"{SVG}text"):
        kinds = text.attrib["class"].split()
        size = draw_figures.SIZES[kinds[0]]
        words = text.text or ""
        width = len(words) * size * ADVANCE
        left = float(text.attrib["x"])
        if "middle" in kinds:
            left -= width / 2
        baseline = float(text.attrib["y"])
        found.append(Area(left, baseline - 0.75 * size, left + width, baseline + 0.2 * size, words))
    return found


def boxes(figure: ET.Element) -> list[Area]:
    found = []
    for box in figure.iter(f"{SVG}rect"):
        x, y, width, height = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        found.append(Area(x, y, x + width, y + height))
    return found


@pytest.mark.parametrize("name", draw_figures.FIGURES)
def test_a_committed_figure_is_what_the_script_draws(name):
    committed = (draw_figures.FOLDER / f"{name}.svg").read_text()
    assert committed == draw_figures.FIGURES[name]().svg(), "run python scripts/draw_figures.py"


def test_every_figure_has_a_drawing():
    names = {path.stem for path in draw_figures.FOLDER.glob("*.svg")}
    assert names == {*draw_figures.FIGURES}


@pytest.mark.parametrize("name", draw_figures.FIGURES)
def test_texts_neither_overlap_nor_cross_the_border_of_a_box(name):
    figure = ET.fromstring(draw_figures.FIGURES[name]().svg())
    found = texts(figure)
    assert found
    for one, other in combinations(found, 2):
        assert not one.overlaps(other), (one, other)
    for text in found:
        for box in boxes(figure):
            assert text.inside(box) or not text.overlaps(box), (text, box)


@pytest.mark.parametrize("name", draw_figures.FIGURES)
def test_a_figure_has_the_same_shapes_in_dark_mode(name):
    light, dark = draw_figures.style().split("@media (prefers-color-scheme: dark)")
    figure = ET.fromstring(draw_figures.FIGURES[name]().svg())
    used = {kind for part in figure.iter() for kind in part.attrib.get("class", "").split()}
    for kind in used:
        assert f".{kind} " in light or f".{kind}," in light, kind
    assert draw_figures.LIGHT.keys() == draw_figures.DARK.keys()
    assert all(f".{kind} {{ fill" in dark for kind in draw_figures.DARK)


def test_the_layers_are_those_that_import_linter_checks():
    project = tomli.loads((ROOT / "pyproject.toml").read_text())
    package = project["tool"]["importlinter"]["contracts"][0]
    assert [names for names, _ in draw_figures.LAYERS] == package["layers"]


@pytest.mark.parametrize("name", draw_figures.FIGURES)
def test_modules_named_in_a_figure_exist(name):
    figure = draw_figures.FIGURES[name]().svg()
    for path in re.findall(r"[\w/]+\.py\b|\b(?:data|resilience)/\w+", figure):
        assert (ROOT / "torchtitan/experiments/tst" / path).exists(), path
