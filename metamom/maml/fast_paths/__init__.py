"""Shorter ways to a meta-gradient, for a model and a loss that the general path has seen before."""
