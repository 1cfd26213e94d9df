"""Predict what steps cost."""
