"""What a learner refuses, and how it says so: batches, models, losses and results that do not fit."""
