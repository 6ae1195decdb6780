"""Helpers shared by all packages: argument checks, numbers as text, files, records."""
