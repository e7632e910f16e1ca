"""What runs have come to: their curves, and the paper's three comparisons of them."""
