"""The command ``tst``, with a module for each of its commands.

The docstring of a module is the command's help. The parameters of its function ``main`` are the
command's arguments. A module here only parses and prints. The work is done by the library, which
never imports from here. ``python -m torchtitan.experiments.tst`` runs the commands.
"""

COMMANDS = {
    "before a run": ("configs", "assets", "tokenize", "check", "plan", "dry-run", "diff", "sweep"),
    "run": ("train",),
    "after a run": ("compare", "export", "evaluate", "sample"),
    "your own code": ("core", "conformance"),
}

ON_03 = ("configs", "check", "train", "core", "conformance")  # with TorchTitan 0.3, too
