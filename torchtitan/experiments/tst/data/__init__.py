"""Data that upstream's loaders do not cover."""
