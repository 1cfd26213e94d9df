"""Do harm to a live cluster under load, and count what its clients see of it."""
