"""The meta-gradient as one compiled graph."""
