"""Job configs: the sections of this package, and the allowed values of every key."""
