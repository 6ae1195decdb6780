"""How long a meta-iteration takes: metamom, eager and compiled, and its peers."""
