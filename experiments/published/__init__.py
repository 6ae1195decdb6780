"""The field's published numbers on Omniglot and sinusoids: recipes as data, runs of them, and tables that compare them.

``metamom reproduce omniglot`` and ``metamom reproduce sinusoid`` run a recipe; ``python -m
metamom.experiments.published`` collects such runs.
"""
