"""The host's time in a decode step."""
