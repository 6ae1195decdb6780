"""The parameter server: aggregates the workers' gradients into one."""
