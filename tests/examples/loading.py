"""The examples of the docs, imported from their paths."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def load_example(name: str) -> ModuleType:
    """Import docs/examples/NAME.py once, by the name that it has in the root of the repository."""
    full_name = f"docs.examples.{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, EXAMPLES / f"{name}.py")
        assert spec and spec.loader
        module = sys.modules[full_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full_name]
