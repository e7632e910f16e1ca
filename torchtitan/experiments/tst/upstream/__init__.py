"""Private names and patches of TorchTitan and torch; its README lists all of them."""
