"""The help of the scripts on the command line."""

import argparse


def documented_parser(documentation: str) -> argparse.ArgumentParser:
    """Return a parser whose help begins with the first line of a script's docstring.

    The rest of the docstring is at the end of the help.
    """
    return argparse.ArgumentParser(
        description=documentation.partition("\n")[0],
        epilog=documentation.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
