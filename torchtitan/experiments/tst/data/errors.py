"""Errors of training data."""

from ..errors import UserError


class DataError(UserError, RuntimeError):
    """Data that cannot be read, or can no longer be read; the message names it."""


class RecordError(DataError):
    """A record that is not a document, or a file that cannot be read; the message names both."""
