"""Token Superposition Training on TorchTitan 0.3: ``superposed.superposed`` and its trainer.

This package needs TorchTitan 0.3; most others of this folder need 0.2.2. It shares ``core`` and the
keys of ``[superposition]`` with them.
"""
