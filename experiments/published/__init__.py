"""The field's published numbers on Omniglot and sinusoids: recipes as data, runs of them, and tables beside them.

``metamom reproduce omniglot`` and ``metamom reproduce sinusoid`` run a recipe; ``python -m
metamom.experiments.published`` collects such runs.
"""
