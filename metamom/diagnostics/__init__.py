"""Measure how biased a meta-gradient is, and where the bias comes from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
