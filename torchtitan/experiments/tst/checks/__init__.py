"""Checks of a job before it starts: config, files, machine, data, checkpoints."""
