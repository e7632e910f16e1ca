"""Tools for tests of this package and of your own models: many ranks on one machine."""
