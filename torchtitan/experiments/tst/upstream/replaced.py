"""Replace functions and values of other packages.

Every replacement in TorchTitan, torch or the standard library uses this module. So a name that no
longer exists is an error, and not a patch without effect. Additions, such as functions that
``torch.cpu`` lacks, are set directly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def replace(owner: Any, name: str, value: Any) -> None:
    """Replace an attribute for the rest of the process.

    Args:
        owner: a module, a class or an object.
        name: name of the attribute.
        value: its new value.

    Raises:
        AttributeError: if there is no such attribute.
    """
    getattr(owner, name)
    setattr(owner, name, value)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute in this context; arguments and errors as for :func:`replace`."""
    inherited = name not in vars(owner)
    before = vars(owner).get(name)  # unlike getattr, keeps a static method as such
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
    """Set items of a mapping in this context, and restore all its items at the end.

    Args:
        mapping: a mapping such as ``os.environ``.
        items: the items to set.
    """
    before = dict(mapping)
    mapping.update(items)
    try:
        yield
    finally:
        mapping.clear()
        mapping.update(before)
