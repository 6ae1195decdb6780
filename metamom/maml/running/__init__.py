"""Run anybody's model with weights of its own for each task: on all tasks at once, or task by task."""
