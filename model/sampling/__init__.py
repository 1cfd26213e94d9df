"""Draw tokens from logits, on any device."""
