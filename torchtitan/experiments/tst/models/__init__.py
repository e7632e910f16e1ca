"""Flavors of TorchTitan's Llama 3 and Qwen 3: the paper's, the demo's, and small ones for tests."""

from .flavors import register

__all__ = ["register"]
