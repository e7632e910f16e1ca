"""Surviving: any TorchTitan run stops in order, resumes, and never trains on NaN."""
