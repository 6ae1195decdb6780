"""The parameter server: the workers' gradients become one gradient."""
