"""docs/troubleshooting.md has every error and warning of the package, and no other.

The page quotes a message as a skeleton: ``...`` stands for a value, or for a part that is not
shown. The messages are read from the sources, so nothing is imported.
"""

import ast
import functools
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "torchtitan/experiments/tst"
PAGE = ROOT / "docs/troubleshooting.md"
SCRIPTS = ["run_train.sh", "scripts/job.sh", "scripts/venv.sh", "scripts/slurm/setup.sh"]
SCRIPTS += [
    f"scripts/slurm/{name}"
    for name in ("chain.sh", "train.sbatch", "tokenize.sbatch", "evaluate.sbatch")
]

VALUE = "\0"  # stands for a value in a message
LETTERS = 10  # a message with fewer letters of its own is composed: its texts are elsewhere

OURS, OTHERS = "message", "message of TorchTitan, torch or the hub"  # headers of the page's tables
# Calls that show a text to the user, and the position of the text.
SHOWS = {"logger.warning": 0, "logging.warning": 0, "warn_once": 1, "sys.exit": 0}
SHOWS |= {"print_and_exit": 0, "warnings.warn": 0}
BUILTIN = {"ValueError", "TypeError", "RuntimeError", "NotImplementedError", "OSError"}
BUILTIN |= {"FileExistsError", "FileNotFoundError", "UnpicklingError"}
# Where an exception that is not a UserError is none that a user of a job meets.
INTERNAL = {
    "core/bags.py": "for callers of the library: the checks of a job find it first",
    "core/schedule.py": "for callers of the library: the checks of a job find it first",
    "testing/": "for tests and scripts",
    "upstream/cpu.py": "for callers of the module",
    "upstream/fake_pipeline.py": "internal to a dry run, which reports it",
}
# Modules whose texts follow "must be" in an error of config/values.py.
RANGES = [f"config/{name}.py" for name in ("allowed", "sections", "upstream_ranges", "values")]
# Sources of the messages that are not ours: files of installed packages.
UPSTREAM = {
    "torchtitan": [
        "train.py",
        "components/*.py",
        "tools/utils.py",
        "distributed/*.py",
        "protocols/*.py",
    ],
    "torch": [
        "distributed/elastic/multiprocessing/errors/__init__.py",
        "distributed/distributed_c10d.py",
        "distributed/tensor/_random.py",
    ],
    "datasets": ["load.py"],
    "huggingface_hub": ["_snapshot_download.py", "utils/_http.py"],
}
COMPILED = {  # messages of the compiled parts of torch, and of the operating system
    "CUDA out of memory. Tried to allocate",
    "Watchdog caught collective operation timeout:",
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "EADDRINUSE",
}
OLDER = {  # messages that torch no longer has, and its first version without them
    "Set timeout is now only supported for either nccl or gloo.": "2.14",
}


class Message(NamedTuple):
    """A text that the package shows, with VALUE for each value, and where it is.

    ``own`` is the part of the text that is written there. Without it, the text is composed.
    """

    text: str
    own: str
    place: str


# The messages of the sources


class Module:
    """A module of the package: its strings and messages."""

    def __init__(self, path: Path, constants: dict[str, str]):
        """Parse a module; ``constants`` are those of all modules, by name."""
        self.name = path.relative_to(PACKAGE).as_posix()
        self.tree = ast.parse(path.read_text())
        self.constants = constants | constants_of(self.tree)

    def text(self, node: ast.AST) -> str:
        """Return the text of an expression, with VALUE for what is not constant."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.Name):
            return self.constants.get(node.id, VALUE)
        if isinstance(node, ast.Attribute):
            return self.constants.get(node.attr, VALUE)
        if isinstance(node, ast.FormattedValue):
            return VALUE if node.conversion == ord("r") else self.text(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(self.text, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.text(node.left) + self.text(node.right)
        return VALUE

    def strings(self) -> Iterator[str]:
        """Yield every string, also those that are parts of messages."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                yield self.text(node)

    def messages(self, errors: set[str]) -> Iterator[Message]:
        """Yield the texts of errors and warnings; ``errors`` are the names of the classes."""
        raised = {
            id(node.exc)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                own = self._shown(name, node, errors, id(node) in raised)
                if own is not None:
                    key = f"{self.text(node.args[0])} = {VALUE}: " if name == "ConfigError" else ""
                    yield Message(key + own, own, f"{self.name}:{node.lineno}")
            elif isinstance(node, ast.ClassDef) and node.name in errors:
                for call in ast.walk(node):
                    if isinstance(call, ast.Call) and call.args and _is_init(call):
                        text = self.text(call.args[0])
                        yield Message(text, text, f"{self.name}:{call.lineno}")

    def _shown(self, name: str, call: ast.Call, errors: set[str], raised: bool) -> str | None:
        """Return the text of its own that a call shows; None if it shows none."""
        texts = [self.text(argument) for argument in call.args]
        internal = any(self.name.startswith(place) for place in INTERNAL)
        builtin = raised and name.rpartition(".")[2] in BUILTIN and not internal
        if (name in errors or builtin) and texts:
            return texts[-1]
        if name == "print" and any("stderr" in ast.unparse(k.value) for k in call.keywords):
            return texts[0]
        if name in SHOWS and len(texts) > SHOWS[name] and not internal:
            return texts[SHOWS[name]]
        return None


def _is_init(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "super().__init__"


def constants_of(tree: ast.Module) -> dict[str, str]:
    """Return the string constants of a module by their names."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name | ast.Tuple):
            target, value = node.targets[0], node.value
            pairs = (
                zip(target.elts, value.elts, strict=False)
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                else [(target, value)]
            )
            for name, constant in pairs:
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    found[ast.unparse(name)] = constant.value
    return found


@functools.cache
def modules() -> list[Module]:
    """Return all modules of the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    known: dict[str, str] = {}
    for path in paths:
        of_module = constants_of(ast.parse(path.read_text()))
        known |= {name: text for name, text in of_module.items() if not name.startswith("_")}
    return [Module(path, known) for path in paths]


@functools.cache
def errors() -> frozenset[str]:
    """Return the names of UserError and of all classes below it."""
    classes = {
        node.name: {ast.unparse(base) for base in node.bases}
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"UserError"}
    while new := {name for name, bases in classes.items() if bases & found} - found:
        found |= new
    return frozenset(found)


@functools.cache
def messages() -> list[Message]:
    """Return the messages of the package."""
    return [message for module in modules() for message in module.messages(set(errors()))]


@functools.cache
def pool() -> str:
    """Return all texts of the package and of its scripts, one a line."""
    texts = [message.text for message in messages()]
    for module in modules():
        strings = [*module.strings()]
        texts += strings
        if module.name in RANGES:
            texts += [f"{VALUE} = {VALUE}: must be {string}" for string in strings]
    for name in SCRIPTS:
        texts.append((ROOT / name).read_text().replace("\\\n", ""))
    return "\n".join(texts)


@functools.cache
def upstream_pool() -> str:
    """Return the strings of the installed packages' files."""
    texts = []
    for package, patterns in UPSTREAM.items():
        spec = find_spec(package)
        assert spec and spec.origin
        for path in (p for pattern in patterns for p in Path(spec.origin).parent.glob(pattern)):
            tree = ast.parse(path.read_text())
            texts += [path.read_text()]  # names of classes, too
            texts += [_joined(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
            constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
            texts += [text for text in constants if isinstance(text, str)]
    return "\n".join(texts)


def _joined(node: ast.JoinedStr) -> str:
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values
    )


# The entries of the page


def entries(header: str) -> list[str]:
    """Return the skeletons of the page, from the tables with this first header."""
    found, inside = [], False
    for line in PAGE.read_text().splitlines():
        if not line.startswith("|"):
            inside = False
        elif re.match(r"\| *-", line):
            continue
        elif inside:
            found += re.findall(r"`([^`]+)`", line.split(" | ")[0])
        else:
            inside = line.split("|")[1].strip() == header
    return found


_GAP = r"\.{3,}"  # a full stop may be next to a value


def parts(skeleton: str) -> list[str]:
    """Return the literal parts of a skeleton: what is between its values."""
    return [part for part in re.split(_GAP, skeleton) if letters(part)]


def letters(text: str) -> int:
    """Return the number of letters."""
    return sum(map(str.isalpha, text))


def matches(skeleton: str, text: str) -> bool:
    """Return whether a text is a skeleton with anything in the place of each ``...``."""
    pattern = ".*".join(map(re.escape, re.split(_GAP, skeleton)))
    return re.fullmatch(pattern, text, re.DOTALL) is not None


@pytest.mark.parametrize("skeleton", entries(OURS))
def test_quoted_messages_exist(skeleton):
    missing = [part for part in parts(skeleton) if part.strip() not in pool()]
    assert not missing, f"{PAGE.name} quotes what no message says: {missing}"


@pytest.mark.parametrize("skeleton", entries(OTHERS))
def test_quoted_messages_of_others_exist(skeleton):
    elsewhere = COMPILED | {part for part, gone in OLDER.items() if torch.__version__ >= gone}
    known = [part for part in parts(skeleton) if part.strip() not in elsewhere]
    missing = [part for part in known if part.strip() not in upstream_pool()]
    assert not missing, f"{PAGE.name} quotes what no installed package says: {missing}"


def test_every_message_has_an_entry():
    skeletons = [skeleton for skeleton in entries(OURS) if letters(skeleton) >= LETTERS]
    missing = [
        f"  {message.place}: {message.text.replace(VALUE, '...')}"
        for message in messages()
        if letters(message.own) >= LETTERS
        and not any(matches(skeleton, message.text) for skeleton in skeletons)
    ]
    listed = "\n".join(missing)
    assert not missing, (
        f"{len(missing)} messages have no entry in docs/troubleshooting.md. Add each to the table "
        "of its situation, in backticks and with ... for values, or to an entry that means the "
        f"same:\n{listed}"
    )


def test_the_sources_are_read():
    texts = {message.text for message in messages()}
    assert len(texts) > 200
    config_error = f"training.seq_len = {VALUE}: must be a multiple of the bag size {VALUE} with "
    assert any(text.startswith(config_error) for text in texts)
    assert {"ConfigError", "DamageError", "ShardError"} <= errors()


def test_a_message_is_told_from_another():
    text = f"{VALUE} needs {VALUE} GPUs: set {VALUE}"
    assert matches("... needs ... GPUs: ...", text)
    assert not matches("... needs ... GPUs", text)
    assert not matches("needs ... GPUs: ...", text)
