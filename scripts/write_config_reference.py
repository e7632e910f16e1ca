"""Write the tables of keys in docs/config.md from the dataclasses of the sections.

    python scripts/write_config_reference.py           write them
    python scripts/write_config_reference.py --check   only say which differ; exit 1 if one does

Each table stands between the lines `<!-- keys of [SECTION] -->` and `<!-- end of keys -->`. The
rest of the page is written by hand. Types, defaults, ranges, units and texts are those of
torchtitan/experiments/tst/config/sections.py.
"""

import ast
import inspect
import json
import re
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torchtitan.config import JobConfig as UpstreamJobConfig

from command_line import documented_parser
from torchtitan.experiments.tst.config.job_config import JobConfig
from torchtitan.experiments.tst.config.sections import Unit
from torchtitan.experiments.tst.config.values import kinds_of, range_of, type_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"
HEAD = "| key | type | default | allowed | unit | meaning |\n| --- | --- | --- | --- | --- | --- |"
WORDS = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "`None`"}


def sections() -> dict[str, type]:
    """Return the class of each section that this package adds to TorchTitan's."""
    upstream = {f.name for f in fields(UpstreamJobConfig)}
    return {f.name: f.type for f in fields(JobConfig) if f.name not in upstream}


def table(name: str, section: type) -> str:
    """Return the table of a section's keys, in Markdown."""
    texts = texts_of(section)
    rows = [row(f"{name}.{f.name}", f, texts[f.name]) for f in fields(section)]
    return "\n".join([HEAD, *rows])


def row(key: str, field: Field, text: str) -> str:
    """Return a row of the table.

    Args:
        key: such as ``superposition.bag_size``.
        field: of the dataclass.
        text: the string below the field.
    """
    kind = type_of(field.type)
    units = [part.name for part in get_args(field.type)[1:] if isinstance(part, Unit)]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    cells = [
        f"`{field.name}`",
        type_in_words(kind),
        f"`{None if default is None else json.dumps(default)}`",
        allowed(key, field.type),
        markdown(" ".join(units)),
        markdown(text),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def type_in_words(kind: Any) -> str:
    """Return such as "integer or list of integers"."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(type_in_words, get_args(kind)))
    if get_origin(kind) is list:
        return f"list of {type_in_words(*get_args(kind))}s"
    return "string" if get_origin(kind) is Literal else WORDS[kind]


def allowed(key: str, annotation: Any) -> str:
    """Return the allowed values of a key, of any type."""
    kind = type_of(annotation)
    choices = get_args(kind) if get_origin(kind) is Literal else (True, False)
    if kind is bool or get_origin(kind) is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in choices)
    values = range_of(key, annotation)
    return values.text if values else "any"


def texts_of(section: type) -> dict[str, str]:
    """Return the string below each field of a dataclass.

    Raises:
        ValueError: naming a field without one.
    """
    (tree,) = ast.parse(inspect.getsource(section)).body
    texts: dict[str, str] = {}
    for node, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            text = getattr(below.value, "value", None) if isinstance(below, ast.Expr) else None
            if not isinstance(text, str):
                raise ValueError(f"{section.__name__}.{node.target.id}: no text below it")
            texts[node.target.id] = inspect.cleandoc(text)
    return texts


def markdown(text: str) -> str:
    """Return a text as one cell of a table.

    A line that begins with "- " is an item of a list; lines with an indent continue it.
    """
    parts: list[str] = []
    for line in text.splitlines():
        begins = not parts or line.startswith("- ")
        if begins or (not line.startswith(" ") and parts[-1].startswith("- ")):
            parts.append(line)
        else:
            parts[-1] += f" {line.strip()}"
    keys = kinds_of(JobConfig)
    return re.sub(
        r"(?<![`\w.])\w+(?:\.\w+)+",
        lambda found: f"`{found[0]}`" if found[0] in keys else found[0],
        "<br>".join(parts),
    )


def updated(page: str, classes: dict[str, type]) -> str:
    """Return a page with the tables as the code has them.

    Args:
        page: its text.
        classes: the sections, by name.

    Raises:
        ValueError: naming a section that the page has no place for, or one that does not exist.
    """
    if unknown := set(re.findall(r"<!-- keys of \[(\w+)\] -->", page)) - classes.keys():
        raise ValueError(f"there are no sections {', '.join(sorted(unknown))}")
    for name, section in classes.items():
        begin, end = f"<!-- keys of [{name}] -->\n", "<!-- end of keys -->"
        before, found, rest = page.partition(begin)
        _, ends, after = rest.partition(end)
        if not (found and ends):
            raise ValueError(f"no place for the keys of [{name}]: add the lines {begin}{end}")
        page = f"{before}{begin}\n{table(name, section)}\n\n{end}{after}"
    return page


def main() -> None:
    """Run from the command line."""
    parser = documented_parser(__doc__ or "")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    page = PAGE.read_text()
    try:
        new = updated(page, sections())
    except ValueError as error:
        sys.exit(f"{PAGE.name}: {error}")
    if not args.check:
        PAGE.write_text(new)
    elif new != page:
        differing = [
            name for name, section in sections().items() if table(name, section) not in page
        ]
        sys.exit(
            f"{PAGE.name} differs from the code in {', '.join(differing)}: run "
            "python scripts/write_config_reference.py"
        )


if __name__ == "__main__":
    main()
