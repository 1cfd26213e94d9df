"""Checks of results against definitions or the CPU."""
