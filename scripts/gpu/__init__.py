"""The check of a GPU: backends, what is checked for correctness, and what is timed."""
