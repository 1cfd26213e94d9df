"""Time to first token by tier."""
