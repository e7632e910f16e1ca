"""Checkpoints: complete or absent, checked, safe to open, resumable on other machines."""
