"""Every patch and every private name of TorchTitan and torch; README.md lists them."""
