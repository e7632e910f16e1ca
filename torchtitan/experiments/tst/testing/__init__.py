"""What tests of this package, and of models of one's own, need: many ranks on one machine."""
