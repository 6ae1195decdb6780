"""Steps and bytes of a model in DDP: bias operators and PyTorch's own communication hooks."""
