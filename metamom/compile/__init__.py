"""Compile the meta-gradient into one graph."""
