"""What the scripts share on the command line: their help, and tables."""

import argparse
from collections.abc import Sequence


def documented_parser(documentation: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's docstring and ends with the rest of it."""
    return argparse.ArgumentParser(
        description=documentation.partition("\n")[0],
        epilog=documentation.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
