"""Helpers shared by several experiments."""
