"""Token Superposition Training (arXiv 2605.06546) on top of TorchTitan.

Read ``core`` first (the method, torch only), then ``training.trainer`` (the training loop),
``config.sections`` (the ``[superposition]`` section) and ``train`` (the entry point).
"""
