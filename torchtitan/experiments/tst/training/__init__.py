"""The trainer of both phases, and its parts of a model's train spec."""
