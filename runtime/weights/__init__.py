"""Weights from the files that people have to the types that the networks take."""
