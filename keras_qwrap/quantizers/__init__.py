"""Quantizers: one family a file, and what they all answer."""
