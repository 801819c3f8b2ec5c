"""Whole models: their graphs, copies of them, and what they are converted to."""
