"""What the scripts share on the command line: their help."""

import argparse


def documented_parser(documentation: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's docstring and ends with the rest of it."""
    return argparse.ArgumentParser(
        description=documentation.partition("\n")[0],
        epilog=documentation.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
