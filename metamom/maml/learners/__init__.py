"""MAML's neighbours with its interface, and the kinds of learners by name."""
