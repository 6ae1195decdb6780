"""Every method on every problem, each with its own best step size: one table and one picture."""
