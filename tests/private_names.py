"""The tables in ``upstream/README.md``, which list names of torch and TorchTitan."""

import contextlib
import importlib
import inspect
import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "torchtitan/experiments/tst"
README = (PACKAGE / "upstream/README.md").read_text()
ROW = re.compile(r"^\| `([\w.]+)` \| ((?:`[\w./]+`(?:, )?)+) \| [^|]+ \|", re.MULTILINE)
TABLE = {name: re.findall(r"`(.+?)`", files) for name, files in ROW.findall(README)}


def of_engine(engine: str) -> list[str]:
    """Names that code for TorchTitan "0.2" or "0.3" uses; shared code counts as "0.2"."""
    only_03 = [all(file.startswith("titan03/") for file in files) for files in TABLE.values()]
    return [name for name, of_03 in zip(TABLE, only_03, strict=True) if of_03 == (engine == "0.3")]


def source_of(cls: type) -> str:
    with contextlib.suppress(OSError, TypeError):  # of classes that are not Python's code
        return inspect.getsource(cls)
    return ""


def resolve(name: str):
    """The object of a dotted name; of an attribute of instances, the class that assigns it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if inspect.isclass(found) and not hasattr(found, part):
                assert any(f"self.{part}" in source_of(base) for base in found.__mro__), name
            else:
                found = getattr(found, part)
        return found
    raise AssertionError(f"{name}: no such module")
