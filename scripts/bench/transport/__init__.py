"""The transport beside raw paths."""
