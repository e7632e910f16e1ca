"""The training loop of both phases, and the parts of a model's train spec."""
