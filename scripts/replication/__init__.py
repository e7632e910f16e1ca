"""Make the runs of docs/results.md: sweeps, their results as CSV, tables and plots."""
