"""Errors of training data."""

from ..errors import UserError


class DataError(UserError, RuntimeError):
    """Data that cannot be read, or not any more; the message names them."""


class RecordError(DataError):
    """A record that is no document, or a file that cannot be read; the message names both."""
