"""What a body asks for: read in this process, or in one of its own if it is large."""
