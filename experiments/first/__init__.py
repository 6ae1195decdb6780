"""Three first experiments on quadratics: momentum and noise, momentum and bias, and tuning under both."""
