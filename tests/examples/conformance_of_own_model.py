"""The model of docs/examples/own_model.py under this trainer, as the conformance suite sees it.

tst conformance tests/examples/conformance_of_own_model.py
"""

import conformance_of_trainer
from loading import load_example

load_example("own_model")  # this registers the model; for my_model.py: import my_model


class TST(conformance_of_trainer.TST):
    """The trainer with a model of one's own."""

    model = "own_model"
    arguments = ("--model.name=own_model", "--model.flavor=small")
    vocab_size = 1024  # of the flavor
