"""Tests of the examples; ``from loading import load_example`` works in files for ``tst``, too."""

from loading import load_example

__all__ = ["load_example"]
