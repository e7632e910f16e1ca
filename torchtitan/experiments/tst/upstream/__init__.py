"""Every patch and every private name of TorchTitan and torch; its README lists them."""
