"""When does momentum beat plain SGD under biased gradients? A map of quadratics, and two checks on networks."""
