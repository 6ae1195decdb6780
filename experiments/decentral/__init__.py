"""The floors of momentum without a server, under biased gradients: measured, and in closed form."""
