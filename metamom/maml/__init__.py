"""Meta-gradients: the learner, its estimators, and what runs a model with weights of its own for each task."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
