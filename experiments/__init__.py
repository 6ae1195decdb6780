"""Experiments on metamom: each file one claim or one tool for claims."""
