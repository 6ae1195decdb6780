"""How long a meta-iteration takes: metamom, eager and compiled, beside its peers."""
