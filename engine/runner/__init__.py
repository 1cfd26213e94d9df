"""Run step plans: arrange them as batches, compute them, and sample tokens."""
