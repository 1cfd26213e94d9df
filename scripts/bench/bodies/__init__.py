"""The event loop under large bodies."""
