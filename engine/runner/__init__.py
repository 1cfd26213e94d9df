"""Run step plans: lay them out as batches, compute them, and turn what was drawn into tokens."""
