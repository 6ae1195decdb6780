"""Three first experiments on quadratics: what momentum does to noise, to bias, and what tuning does about both."""
