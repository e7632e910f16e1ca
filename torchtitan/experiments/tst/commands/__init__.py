"""The command ``tst``: a module for each of its commands.

A module here has a docstring, which is the command's help, and a function ``main``, whose
parameters are its arguments. It parses and prints; what the command does is in the library, which
never imports from here. ``python -m torchtitan.experiments.tst`` runs them.
"""

COMMANDS = {
    "before a run": ("configs", "assets", "tokenize", "check", "plan", "dry-run", "diff", "sweep"),
    "the run": ("train",),
    "after it": ("compare", "export", "evaluate", "sample"),
}
