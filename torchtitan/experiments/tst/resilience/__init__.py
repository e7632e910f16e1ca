"""Fault tolerance for any TorchTitan run: it stops in order, resumes, and never trains on NaN."""
