"""What to quantize, and how, in a whole model."""
