"""Time and bytes of a step over processes: measurements, a model fitted to them, and where compression pays off."""
