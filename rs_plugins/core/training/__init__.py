"""Training: one loop, and one objective per method."""
