"""Carry bulk bytes: over the control connection, or by one-sided reads through UCX."""
