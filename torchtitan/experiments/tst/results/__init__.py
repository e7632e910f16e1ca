"""The results of runs: curves, the paper's three comparisons, evaluation, sampling and export."""
