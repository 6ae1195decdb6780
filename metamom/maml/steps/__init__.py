"""A step of the server: from the workers' meta-gradients to ``.grad``."""
