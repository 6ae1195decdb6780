"""The bias floor does not depend on beta, momentum's own error shrinks with beta, and remedies lower the floor."""
