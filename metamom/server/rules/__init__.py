"""Robust means, one a file: typed records with a pure function of the workers' vectors."""
