"""Transport moves bytes between nodes and knows nothing of what they mean."""
