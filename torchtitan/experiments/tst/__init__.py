"""Token Superposition Training (arXiv 2605.06546) on top of TorchTitan.

Reading order: ``core`` (the method, torch only), ``job_config`` (the ``[superposition]``
section), ``trainer`` (how a training loop uses both), ``train`` (the entry point).
"""
