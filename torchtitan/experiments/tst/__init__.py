"""Token Superposition Training (arXiv 2605.06546) on top of TorchTitan.

Reading order: ``core`` (the method, torch only), ``training.trainer`` (how a training loop uses
it), ``config.sections`` (the ``[superposition]`` section), ``train`` (the entry point).
"""
