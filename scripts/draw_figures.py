"""Draw the diagrams of the docs as SVG files, in docs/figures.

The files are committed. Draw them again after a change of this script:

    python scripts/draw_figures.py

Each file has colors for light and for dark mode, and a background of its own.
"""

from pathlib import Path
from xml.sax.saxutils import escape

from command_line import documented_parser

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
STORY = "Once upon a time there was a small cat who sat on a mat and slept"
# Fill and border of bag i, then of the other shapes, in light and in dark mode.
LIGHT = {
    "bag0": ("#d8e7fd", "#3577d4"),
    "bag1": ("#fde2c4", "#c9731c"),
    "bag2": ("#d3efda", "#2f9150"),
    "bag3": ("#ead9f8", "#8548bf"),
    "panel": ("#ffffff", "#d0d7de"),
    "box": ("#f3f5f8", "#8b95a1"),
    "none": ("#ffffff", "#b9c0c9"),
}
DARK = {
    "bag0": ("#173a66", "#6ba3ee"),
    "bag1": ("#5c3611", "#e59a4a"),
    "bag2": ("#164a2a", "#5cc07e"),
    "bag3": ("#45266a", "#b78be6"),
    "panel": ("#0f1420", "#30363d"),
    "box": ("#212835", "#7d8794"),
    "none": ("#0f1420", "#4a525e"),
}
INK = {"light": ("#1f2328", "#59636e"), "dark": ("#e8edf3", "#a0aab5")}
SIZES = {"title": 18, "label": 15, "note": 14}  # of text, in px


def style() -> str:
    """Return the style sheet of every figure."""
    rules = [
        "text { font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif }"
    ]
    rules += [f".{name} {{ font-size: {size}px }}" for name, size in SIZES.items()]
    rules += [".title, .bold { font-weight: 600 }", ".middle { text-anchor: middle }"]
    rules += [".end { text-anchor: end }", ".dashed { stroke-dasharray: 5 4 }"]
    rules += colors(LIGHT, *INK["light"])
    dark = "\n  ".join(colors(DARK, *INK["dark"]))
    return "\n".join([*rules, f"@media (prefers-color-scheme: dark) {{\n  {dark}\n}}"])


def colors(shapes: dict[str, tuple[str, str]], ink: str, faint: str) -> list[str]:
    """Return the rules of one mode: shapes, text and lines."""
    rules = [f".{name} {{ fill: {fill}; stroke: {line} }}" for name, (fill, line) in shapes.items()]
    rules += [f"text {{ fill: {ink} }}", f".faint {{ fill: {faint} }}"]
    rules += [f".line {{ stroke: {faint}; fill: none; stroke-width: 1.5 }}"]
    rules += [f".rule {{ stroke: {shapes['panel'][1]} }}"]
    return [*rules, f".head {{ fill: {faint} }}"]


class Figure:
    """A drawing with a panel behind it."""

    def __init__(self, width: int, height: int, title: str):
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}">'
        )
        self.parts = [f"<title>{escape(title)}</title>", f"<style>\n{style()}\n</style>"]
        self.box(1, 1, width - 2, height - 2, "panel", radius=12)

    def box(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 5):
        """Draw a rectangle with the colors of a kind."""
        size = f'width="{width:g}" height="{height:g}" rx="{radius:g}"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" {size} class="{kind}"/>')

    def text(self, x: float, y: float, text: str, kind: str = "label"):
        """Write text with its baseline at y; the kind has the size, then other classes."""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>')

    def lines(self, x: float, y: float, texts: list[str], kind: str = "label"):
        """Write lines of text, the first with its baseline at y."""
        for i, text in enumerate(texts):
            self.text(x, y + 20 * i, text, kind)

    def line(self, x0: float, y0: float, x1: float, y1: float, kind: str = "line"):
        """Draw a line."""
        self.parts.append(f'<path d="M{x0:g} {y0:g} L{x1:g} {y1:g}" class="{kind}"/>')

    def arrow(self, x0: float, y0: float, x1: float, y1: float):
        """Draw an arrow down or to the right."""
        if x0 == x1:
            self.line(x0, y0, x1, y1 - 6)
            tip = f"M{x1:g} {y1:g} l-5 -8 h10 Z"
        else:
            self.line(x0, y0, x1 - 6, y1)
            tip = f"M{x1:g} {y1:g} l-8 -5 v10 Z"
        self.parts.append(f'<path d="{tip}" class="head"/>')

    def tokens(self, x: float, y: float, words: list[str], kind: str, width: float = 55):
        """Draw a row of tokens, each the width with its gap."""
        for i, word in enumerate(words):
            self.box(x + i * width, y, width - 4, 34, kind)
            self.text(x + i * width + (width - 4) / 2, y + 22, word, "note middle")

    def svg(self) -> str:
        """Return the file."""
        return "\n".join([self.head, *self.parts, "</svg>"]) + "\n"


def bag(i: int) -> list[str]:
    """Return the words of bag i."""
    return STORY.split()[4 * i : 4 * i + 4]


def tst() -> Figure:
    """The method and its two phases."""
    figure = Figure(
        900, 560, "Token Superposition Training: bags of tokens first, then single tokens"
    )
    figure.text(28, 40, "Superposition: bags of s = 4 tokens", "title")
    figure.lines(28, 82, ["data tokens"], "label faint")
    figure.lines(28, 160, ["embeddings,", "averaged"], "label faint")
    figure.lines(28, 303, ["predicted:", "the next bag"], "label faint")
    for i in range(3):
        x = 176 + i * 236
        middle = x + 108
        figure.tokens(x, 60, bag(i), f"bag{i}")
        for j in range(4):
            figure.line(x + 25.5 + j * 55, 94, middle, 146)
        figure.box(middle - 46, 146, 92, 36, f"bag{i}", radius=18)
        figure.text(middle, 169, "latent", "label middle")
        figure.arrow(middle, 182, middle, 212)
        figure.arrow(middle, 256, middle, 286)
        figure.tokens(x, 290, bag(i + 1), f"bag{i + 1}")
    figure.box(176, 212, 688, 44, "box", radius=8)
    figure.text(520, 239, "Transformer and LM head of an ordinary model", "label middle bold")
    run(figure)
    return figure


def run(figure: Figure):
    """Draw the phases on the line of training steps, with the height of data tokens a step."""
    figure.line(28, 350, 872, 350, "rule")
    figure.text(28, 384, "One run", "title")
    figure.lines(28, 446, ["data tokens", "a step"], "label faint")
    left, boundary, right, bottom = 176, 380, 728, 508
    for i in range(4):
        figure.box(left, bottom - 28 * (i + 1), boundary - left, 28, "bag0", radius=0)
    figure.box(boundary, bottom - 28, right - boundary, 28, "bag0", radius=0)
    middle = (left + boundary) / 2
    figure.text(middle, 443, "superposition", "label middle bold")
    figure.text(middle, 471, "s times the tokens", "note middle")
    figure.text((boundary + right) / 2, 468, "recovery: next-token training", "label middle bold")
    figure.line(boundary, 384, boundary, 520, "line dashed")
    figure.text(boundary + 12, 404, "boundary checkpoint", "label")
    figure.arrow(left, 520, right + 12, 520)
    figure.text(middle, 541, "share r of the steps", "note middle faint")
    figure.text((boundary + right) / 2, 541, "training steps of equal cost", "note middle faint")
    figure.arrow(right + 4, 494, right + 32, 494)
    figure.box(right + 34, 468, 110, 52, "box", radius=8)
    figure.text(right + 89, 490, "ordinary", "label middle bold")
    figure.text(right + 89, 509, "model", "label middle bold")


FIGURES = {"tst": tst}


def main():
    documented_parser(__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
