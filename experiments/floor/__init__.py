"""The bias floor is the same for every beta, momentum's own error shrinks with beta, and cures lower the floor."""
