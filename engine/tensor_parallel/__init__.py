"""Compute one model on several devices: the first process serves, a worker for each other computes along."""
