"""Draw the diagrams of the docs as SVG files, in docs/figures.

The files are committed. Draw them again after a change of this script:

    python scripts/draw_figures.py

Each file has colors for light and for dark mode, and a background of its own.
"""

from pathlib import Path
from xml.sax.saxutils import escape

from command_line import documented_parser

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
BAGS = 4  # colors; bag i has color i
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
SIZES = {"title": 20, "label": 17, "note": 15.5}  # of text, in px


def style() -> str:
    """Return the style sheet of every figure."""
    rules = ["text { font-family: system-ui, 'Segoe UI', Helvetica, Arial, sans-serif }"]
    rules += [f".{name} {{ font-size: {size}px }}" for name, size in SIZES.items()]
    rules += [".title, .bold { font-weight: 600 }", ".middle { text-anchor: middle }"]
    rules += [".dashed { stroke-dasharray: 5 4 }", *colors(LIGHT, *INK["light"])]
    dark = "\n  ".join(colors(DARK, *INK["dark"]))
    return "\n".join([*rules, f"@media (prefers-color-scheme: dark) {{\n  {dark}\n}}"])


def colors(shapes: dict[str, tuple[str, str]], ink: str, faint: str) -> list[str]:
    """Return the rules of one mode: shapes, text and lines."""
    rules = [f".{name} {{ fill: {fill}; stroke: {line} }}" for name, (fill, line) in shapes.items()]
    rules += [f"text {{ fill: {ink} }}", f".faint {{ fill: {faint} }}"]
    rules += [f".line {{ stroke: {faint}; fill: none; stroke-width: 1.5 }}"]
    return [*rules, f".head {{ fill: {faint} }}", f".rule {{ stroke: {shapes['panel'][1]} }}"]


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
            self.text(x, y + 21 * i, text, kind)

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


def tst() -> Figure:
    """Draw the method and its two phases."""
    figure = Figure(900, 560, "Token Superposition Training: bags of tokens, then single tokens")
    words = STORY.split()
    figure.text(28, 40, "Superposition: bags of s = 4 tokens", "title")
    figure.lines(28, 82, ["data tokens"], "label faint")
    figure.lines(28, 160, ["embeddings,", "averaged"], "label faint")
    figure.lines(28, 303, ["predicted:", "the next bag"], "label faint")
    for i in range(3):
        x = 176 + i * 236
        middle = x + 108
        figure.tokens(x, 60, words[4 * i :][:4], f"bag{i}")
        for j in range(4):
            figure.line(x + 25.5 + j * 55, 94, middle, 146)
        figure.box(middle - 46, 146, 92, 36, f"bag{i}", radius=18)
        figure.text(middle, 169, "latent", "label middle")
        figure.arrow(middle, 182, middle, 212)
        figure.arrow(middle, 256, middle, 286)
        figure.tokens(x, 290, words[4 * i + 4 :][:4], f"bag{i + 1}")
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


def fold() -> Figure:
    """Draw how a sequence is cut into bags of inputs and targets."""
    figure = Figure(900, 300, "One sequence of 16 tokens, cut into bags of 4: inputs and targets")
    figure.lines(28, 48, ["tokens", "(B, s·L)"], "label faint")
    figure.lines(28, 148, ["inputs", "(B, L, s)"], "label faint")
    figure.lines(28, 232, ["targets", "(B, L, s)"], "label faint")
    left, pitch = 130, 172
    for i in range(BAGS):
        numbers = [f"{4 * i + j + 1}" for j in range(4)]
        x = left + pitch * i
        figure.tokens(x, 36, numbers, f"bag{i}", pitch / 4)
        figure.arrow(x + 84, 74, x + 84, 132)
        figure.tokens(x + 6, 136, numbers, f"bag{i}", 40)
        figure.arrow(x + 84, 174, x + 84, 216)
        if i < BAGS - 1:
            following = [f"{4 * i + j + 5}" for j in range(4)]
            figure.tokens(x + 6, 220, following, f"bag{i + 1}", 40)
    figure.tokens(left + pitch * BAGS, 36, ["17"], "box", pitch / 4)
    last = left + pitch * (BAGS - 1) + 6
    figure.tokens(last, 220, ["17"], "box", 40)
    figure.tokens(last + 40, 220, ["-"] * 3, "none dashed", 40)
    figure.text(last + 98, 278, "not in the batch: ignored", "note middle faint")
    return figure


def modes() -> Figure:
    """Draw what goes in and what is predicted in each mode."""
    figure = Figure(900, 232, "The modes full, input and output of superposition")
    inputs, targets = ["1", "2", "3", "4"], ["5", "6", "7", "8"]
    columns = (
        ("full", inputs, targets, "s times the tokens"),
        ("input", inputs, targets[:1], "s times the tokens"),
        ("output", inputs[-1:], targets, "no extra tokens"),
    )
    figure.text(28, 96, "input", "label faint")
    figure.text(28, 170, "target", "label faint")
    for i, (name, above, below, reads) in enumerate(columns):
        middle = 228 + 250 * i
        figure.text(middle, 42, f'mode = "{name}"', "label middle bold")
        figure.tokens(middle - 20 * len(above) + 2, 74, above, "bag0", 40)
        figure.arrow(middle, 112, middle, 144)
        figure.tokens(middle - 20 * len(below) + 2, 148, below, "bag1", 40)
        figure.text(middle, 208, reads, "note middle faint")
    return figure


def scale() -> Figure:
    """Draw the two ways to read s times the tokens in a step."""
    figure = Figure(
        900, 280, "An ordinary step, and one of superposition in both scales, for s = 2"
    )
    columns = (
        ("ordinary step", 2, 8, 1, ["2 sequences", "of 8 tokens"]),
        ('scale = "sequence"', 2, 8, 2, ["2 sequences of 16 tokens,", "8 latents each"]),
        ('scale = "batch"', 4, 4, 2, ["4 sequences of 8 tokens,", "4 latents each"]),
    )
    for i, (name, sequences, latents, bag_size, texts) in enumerate(columns):
        x, middle = 42 + 284 * i, 42 + 284 * i + 122
        figure.text(middle, 44, name, "label middle bold")
        left = middle - latents * 15
        for row in range(sequences):
            for column in range(latents):
                for part in range(bag_size):
                    width = 26 / bag_size
                    place = (left + 30 * column + part * width, 68 + 30 * row)
                    figure.box(*place, width, 24, f"bag{row}", radius=2)
        figure.lines(middle, 212, texts, "label middle")
        figure.text(middle, 258, f"{16 * bag_size} tokens, 16 positions", "note middle faint")
        if i:
            figure.line(x - 20, 36, x - 20, 250, "rule")
    return figure


def stages() -> Figure:
    """Draw superposition in stages."""
    figure = Figure(900, 252, "Superposition in stages, with bag sizes of 8, 4 and 2")
    left, bottom, unit, tenth = 176, 190, 17, 66
    figure.lines(28, 104, ["data tokens", "a step"], "label faint")
    for i, bag_size in enumerate((8, 4, 2)):
        x = left + tenth * i
        for j in range(bag_size):
            figure.box(x, bottom - unit * (j + 1), tenth, unit, f"bag{i}", radius=0)
        figure.text(x + tenth / 2, bottom + 24, f"s = {bag_size}", "note middle")
    boundary = left + 3 * tenth
    figure.box(boundary, bottom - unit, 7 * tenth, unit, "box", radius=0)
    middle = boundary + 3.5 * tenth
    figure.text(middle, bottom + 24, "single tokens", "note middle")
    figure.text(middle, bottom - unit - 14, "recovery", "label middle bold")
    figure.text(left + 1.5 * tenth, bottom + 48, "share r = 0.3", "note middle faint")
    figure.text(middle, bottom + 48, "the other steps", "note middle faint")
    figure.line(boundary, 40, boundary, bottom + 8, "line dashed")
    figure.text(boundary + 12, 56, "boundary checkpoint", "label")
    return figure


# As in pyproject.toml: each layer imports only from those below it.
LAYERS = (
    ("__main__ | extension", "the command tst; flavors and data for TorchTitan's trainer"),
    ("commands", "a module for each command: parse, call, print"),
    ("titan03", "all code for TorchTitan 0.3"),
    ("testing | start | train", "many ranks for tests; check and start a job; a rank's entry"),
    ("results | launch", "compare, report, export, evaluate; start torchrun"),
    ("planning", "before a run: cost, layouts, memory, sweeps"),
    ("training", "the trainer of both phases, loss, metrics, validation"),
    ("checks", "everything that would stop a job, found before it starts"),
    ("data", "text, token shards, loaders, tokenizer"),
    ("resilience | models | paper", "checkpoints, stops, faults; flavors; the paper's figures"),
    ("upstream", "patches and private names of TorchTitan and torch"),
    ("config | shipped", "sections and ranges of the job config; files that users copy"),
    ("engine | metrics_file", "which TorchTitan is installed; names in metrics.jsonl"),
    ("expert_metrics", "how evenly experts are used"),
    ("core | errors | file_checks", "the method, torch only; errors that a user can fix"),
)


def layers() -> Figure:
    """Draw the layers of the package."""
    figure = Figure(900, 40 * len(LAYERS) + 44, "The layers of the package; imports point down")
    for i, (names, purpose) in enumerate(LAYERS):
        y = 24 + 40 * i
        figure.box(56, y, 262, 32, "bag0" if "core" in names else "box", radius=6)
        figure.text(187, y + 21, names, "note middle bold")
        figure.text(334, y + 21, purpose, "note")
    figure.arrow(36, 28, 36, 40 * len(LAYERS) + 16)
    return figure


# What happens one after the other, where, and whether it is this package's code.
BATCH = (
    ("windows of s·L + 1 tokens", "data/shards, data/text", True),
    ("inputs, labels (B, s·L)", "data/loader.py", True),
    ("fold into bags (B, L, s)", "core/bags.py", True),
    ("masks; context-parallel sharding", "TorchTitan, with one id for each bag", False),
    ("mean embedding (B, L, d)", "core/embedding.py", True),
    ("transformer (B, L, d)", "TorchTitan", False),
    ("LM head: logits (B, L, V)", "TorchTitan; core/head.py in chunks", False),
    ("bag loss, one number", "core/losses.py", True),
    ("backward, clipping", "TorchTitan", False),
    ("loss and gradient finite?", "resilience/step_check.py", True),
    ("optimizer and learning rate", "TorchTitan", False),
    ("metrics, then a checkpoint if due", "training/metrics.py, resilience/checkpoint", True),
)
CONFIG = (
    ("read TOML and command line", "config/manager.py", True),
    ("check type and range of each key", "config/values.py", True),
    ("check all that would stop the job", "checks/job.py", True),
    ("launch the ranks", "start.py, launch.py", True),
    ("each rank reads and checks again", "train.py, training/trainer.py", True),
    ("build loader, model, optimizer", "TorchTitan, from training/train_spec.py", False),
    ("load a checkpoint, train", "TorchTitan, training/trainer.py", False),
)
CHECKPOINT = (
    ("a save is due", "TorchTitan; resilience/checkpoint/manager.py", False),
    ("write saving-N, with checksums", "resilience/checkpoint/writer.py", True),
    ("write manifest.json", "resilience/checkpoint/manifests.py", True),
    ("link boundary, rename to step-N", "resilience/checkpoint/moves.py", True),
    ("purge old ones, keep marked ones", "resilience/checkpoint/manager.py", True),
    ("next launch: which can resume?", "resilience/checkpoint/inventory.py", True),
    ("are the files intact?", "resilience/checkpoint/damage.py", True),
    ("does the config agree?", "checks/agreement.py", True),
    ("load plain values and tensors", "resilience/checkpoint/reader.py", True),
)


def walk(title: str, steps: tuple[tuple[str, str, bool], ...]) -> Figure:
    """Draw steps, one after the other."""
    figure = Figure(900, 48 * len(steps) + 34, title)
    for i, (what, where, ours) in enumerate(steps):
        y = 24 + 48 * i
        figure.box(28, y, 340, 34, "bag0" if ours else "box", radius=6)
        figure.text(198, y + 22, what, "label middle")
        figure.text(392, y + 22, where, "label faint")
        if i:
            figure.arrow(198, y - 14, 198, y - 1)
    return figure


FIGURES = {draw.__name__: draw for draw in (tst, fold, modes, scale, stages, layers)} | {
    "batch": lambda: walk("From a batch to an optimizer step in superposition", BATCH),
    "config": lambda: walk("From a config to a running job", CONFIG),
    "checkpoint": lambda: walk("From a save to the next launch", CHECKPOINT),
}


def main():
    documented_parser(__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
