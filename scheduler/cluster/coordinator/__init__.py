"""Decide where adapters live, and get them there."""
