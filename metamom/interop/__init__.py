"""Interoperation with other libraries. Importing this package does not import them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
