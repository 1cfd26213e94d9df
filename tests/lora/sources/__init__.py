"""Adapters fetched from servers that behave well, badly, or not at all."""
