"""Data into ranges, and what becomes of ranges in training."""
