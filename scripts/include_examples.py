"""Fill the code blocks of the docs from the examples in docs/examples.

    python scripts/include_examples.py           fill them
    python scripts/include_examples.py --check   only say which pages differ; exit 1 if one does

A block that begins with ```python title="docs/examples/NAME.py: OBJECT" gets the source of that
function, class or assignment. Without ": OBJECT", it gets the whole file.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

from command_line import documented_parser

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r'^(?P<head>(?P<indent> *)```\w+ title="(?P<file>docs/examples/[^":]+)(?:: (?P<name>\w+))?"\n)'
    r".*?^(?P<end> *```)$",
    re.DOTALL | re.MULTILINE,
)


def source(path: Path, name: str | None) -> str:
    """Return the source of a top-level object with its decorators, or the whole file.

    Raises:
        ValueError: if the file or the object does not exist.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    text = path.read_text()
    if name is None:
        return text
    for node in ast.parse(text).body:
        if name in names(node):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            return "".join(text.splitlines(keepends=True)[first - 1 : node.end_lineno])
    raise ValueError(f"{path} defines no {name}")


def names(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def filled(page: str) -> str:
    """Return the text of a page with its blocks filled.

    Raises:
        ValueError: if a file or an object of a block does not exist.
    """

    def fill(block: re.Match[str]) -> str:
        code = source(ROOT / block["file"], block["name"])
        return block["head"] + textwrap.indent(code, block["indent"]) + block["end"]

    return BLOCK.sub(fill, page)


def main() -> None:
    """Run from the command line."""
    parser = documented_parser(__doc__ or "")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    differing = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        page = path.read_text()
        try:
            new = filled(page)
        except ValueError as error:
            sys.exit(f"{path.name}: {error}")
        if new != page:
            differing.append(path.name)
            if not args.check:
                path.write_text(new)
    if args.check and differing:
        sys.exit(
            f"{', '.join(differing)} differ from the examples: run python "
            "scripts/include_examples.py"
        )


if __name__ == "__main__":
    main()
