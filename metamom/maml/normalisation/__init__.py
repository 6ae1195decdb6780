"""What normalisation layers use, and what is learned of them."""
