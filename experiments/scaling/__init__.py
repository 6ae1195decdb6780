"""Time and bytes of a step over processes: measured here, a model fitted to that, and where compression pays by it."""
