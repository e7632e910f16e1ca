"""Functions and values of other packages, replaced in one way.

Whatever this package replaces in TorchTitan, torch or the standard library goes through here, so
that a name that is no longer there is an error, and not a patch without effect. What is only added,
such as functions that ``torch.cpu`` lacks, is set directly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def replace(owner: Any, name: str, value: Any) -> None:
    """Replace an attribute for the rest of the process.

    Args:
        owner: a module, a class or an object.
        name: of the attribute.
        value: in its place.

    Raises:
        AttributeError: if there is no such attribute.
    """
    getattr(owner, name)
    setattr(owner, name, value)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute in this context; arguments and errors as for :func:`replace`."""
    inherited = name not in vars(owner)
    before = vars(owner).get(name)  # a static method as it is written
    replace(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def replaced_items(mapping: Any, items: dict[str, Any]) -> Iterator[None]:
    """Set some items of a mapping in this context, and put back all that it had.

    Args:
        mapping: such as ``os.environ``.
        items: to be set.
    """
    before = dict(mapping)
    mapping.update(items)
    try:
        yield
    finally:
        mapping.clear()
        mapping.update(before)
