"""Check an implementation of Token Superposition Training: does it do what the paper describes?

Describe your implementation by a class ``TST`` with the attributes and methods of
:class:`Implementation`, in a file of your own. Then run ``tst conformance FILE``, or without
TorchTitan ``python -m PACKAGE.conformance FILE``, where PACKAGE has your copy of this folder.

The suite needs torch only. It uses no other module of ``core``: its references are plain and slow
on purpose. Your training loop runs as it is.
"""

from .implementation import AfterStep, Implementation, InterfaceError, load
from .run import Result, check, summary

__all__ = ["AfterStep", "Implementation", "InterfaceError", "Result", "check", "load", "summary"]
