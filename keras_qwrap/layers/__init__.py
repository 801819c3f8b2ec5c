"""One layer: what is known of its class, its weights, and what quantizes it."""
