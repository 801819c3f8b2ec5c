"""What became of a model, and what a file holds, for people to read."""
