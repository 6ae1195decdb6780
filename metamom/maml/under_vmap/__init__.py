"""Functions that `torch.func.vmap` refuses or gets wrong, so that they agree with a loop over tasks."""
