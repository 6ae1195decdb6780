"""Adaptation by proximal problems, and its meta-gradients: implicit and perturbed."""
