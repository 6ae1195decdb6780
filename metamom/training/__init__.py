"""Training runs: the loop, and what a run reads, writes and can be stopped by."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
