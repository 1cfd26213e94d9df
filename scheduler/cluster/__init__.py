"""Decisions across nodes: demand, placement, routing."""
