"""Carry events and commands between nodes and the coordinator."""
