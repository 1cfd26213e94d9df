"""Move bytes between nodes; nothing here knows what they mean."""
